// Activations of MLPs, with a gate and without: contract and formulas in cogsym/ops/activation.py.

#include "scratch.h"

namespace cogsym {

enum class Activation : int { silu, gelu_tanh, gelu, relu, relu2 };  // in the order of Python's ACTIVATIONS
template <>
inline constexpr int choices<Activation> = 5;

namespace COGSYM_ISA {
namespace {

struct GatedActivation {
    const void* gate;  // [rows, F]
    int64_t gate_stride;
    const void* up;  // [rows, F], or null: 1
    int64_t up_stride;
    void* z;  // [rows, F] contiguous
    int64_t rows, F;
    Activation kind;
    DType dtype;
    int num_threads;
};

struct GatedActivationBackward {
    const void* dz;  // [rows, F]
    int64_t dz_stride;
    const void* gate;  // [rows, F]
    int64_t gate_stride;
    const void* up;  // [rows, F], or null: 1
    int64_t up_stride;
    void* dgate;  // [rows, F], or null: not wanted
    void* dup;    // [rows, F], or null: not wanted
    int64_t gradient_stride;
    int64_t rows, F;
    Activation kind;
    DType dtype;
    int num_threads;
};

template <class C>
struct Activated {
    C value, slope;
};

// σ(s) and 1 - σ(s), each with its full relative precision: from e^-|s|, so that nothing overflows or cancels.
template <class C>
struct Sigmoid {
    C value, complement;
    explicit Sigmoid(C s) {
        const C small = exponential(s < 0 ? s : -s), inverse = C(1) / (C(1) + small);
        value = (s < 0 ? small : C(1)) * inverse;
        complement = (s < 0 ? C(1) : small) * inverse;
    }
};

// act(g) = g σ(s(g)), which GELU's tanh form is too, because (1 + tanh t) / 2 = σ(2t); so
// act'(g) = σ(s) + g σ(s) (1 - σ(s)) s'(g), and nothing cancels where the tanh is near -1.
struct Silu {
    template <class C>
    static C value(C g) {
        return g * Sigmoid<C>(g).value;
    }
    template <class C>
    static Activated<C> both(C g) {
        const Sigmoid<C> sigmoid(g);
        return {g * sigmoid.value, sigmoid.value * (C(1) + g * sigmoid.complement)};
    }
};
struct GeluTanh {
    static constexpr double scale = 1.5957691216057308;  // 2 sqrt(2 / π)
    static constexpr double cubic = 0.044715;
    template <class C>
    static C argument(C g) {
        return C(scale) * (g + C(cubic) * g * g * g);
    }
    template <class C>
    static C value(C g) {
        return g * Sigmoid<C>(argument(g)).value;
    }
    template <class C>
    static Activated<C> both(C g) {
        const Sigmoid<C> sigmoid(argument(g));
        const C slope = C(scale) * (C(1) + C(3 * cubic) * g * g);
        return {g * sigmoid.value, sigmoid.value * (C(1) + g * sigmoid.complement * slope)};
    }
};

// The share Φ(g) of the normal distribution below g, and its density, from e^(-g²/2): Φ(-|g|) is that times a function
// that falls as slowly as 1 / |g|, so that nothing cancels.
template <class C>
struct Normal {
    C share, density;
    explicit Normal(C g) {
        const C magnitude = g < 0 ? -g : g, bell = exponential(C(-0.5) * g * g);
        const C below = tail(magnitude, bell);
        share = g < 0 ? below : C(1) - below;
        density = bell * C(0.3989422804014327);
    }
    // Φ(-x), x >= 0. A polynomial in t = 1 / (1 + 0.3 x), fitted for x <= 13.3, beyond which the bell is 0 in float; its
    // relative error is 4e-9.
    static float tail(float x, float bell) {
        const float t = 1.0f / (1.0f + 0.3f * x);
        float p = -0.020584726706147194f;
        p = p * t + 0.1122175082564354f;
        p = p * t - 0.22768047451972961f;
        p = p * t + 0.19104328751564026f;
        p = p * t - 0.07877875864505768f;
        p = p * t + 0.09579380601644516f;
        p = p * t + 0.07852168381214142f;
        p = p * t + 0.11020558327436447f;
        p = p * t + 0.1195756122469902f;
        p = p * t + 0.11968648433685303f;
        return bell * t * p;
    }
    static double tail(double x, double) { return 0.5 * __builtin_erfc(x * 0.7071067811865476); }
};
struct Gelu {
    template <class C>
    static C value(C g) {
        return g * Normal<C>(g).share;
    }
    template <class C>
    static Activated<C> both(C g) {
        const Normal<C> normal(g);
        // Where the density is 0, g may be infinite, and 0 · infinity is not 0.
        return {g * normal.share, normal.share + (normal.density == 0 ? C(0) : g * normal.density)};
    }
};

struct Relu {
    template <class C>
    static C value(C g) {
        return g <= 0 ? C(0) : g;  // a NaN stays one
    }
    template <class C>
    static Activated<C> both(C g) {
        return {value(g), g > 0 ? C(1) : value(g)};
    }
};
struct Relu2 {
    template <class C>
    static C value(C g) {
        return Relu::value(g) * Relu::value(g);
    }
    template <class C>
    static Activated<C> both(C g) {
        return {value(g), C(2) * Relu::value(g)};
    }
};

template <class T>
const T* row_of(const void* x, int64_t stride, int64_t row, int64_t column) {
    return static_cast<const T*>(x) + row * stride + column;
}

template <class T, class Act>
void forward(const GatedActivation& a) {
    for_runs(a.rows, a.F, a.num_threads, [&](int64_t row, int64_t column, int64_t n, int64_t offset) {
        const T* gate = row_of<T>(a.gate, a.gate_stride, row, column);
        T* z = static_cast<T*>(a.z) + offset;
        if (a.up) {
            const T* up = row_of<T>(a.up, a.up_stride, row, column);
            write(z, n, [=](int64_t i) { return Act::value(widen(gate[i])) * widen(up[i]); });
        } else {
            write(z, n, [=](int64_t i) { return Act::value(widen(gate[i])); });
        }
    });
}

template <class T, class Act>
void backward(const GatedActivationBackward& a) {
    using C = compute_t<T>;
    for_runs(a.rows, a.F, a.num_threads, [&](int64_t row, int64_t column, int64_t n, int64_t) {
        const T *dz = row_of<T>(a.dz, a.dz_stride, row, column), *gate = row_of<T>(a.gate, a.gate_stride, row, column);
        const int64_t to = row * a.gradient_stride + column;
        T* dgate = a.dgate ? static_cast<T*>(a.dgate) + to : nullptr;
        T* dup = a.dup ? static_cast<T*>(a.dup) + to : nullptr;
        if (!dgate) {
            write(dup, n, [=](int64_t i) { return widen(dz[i]) * Act::value(widen(gate[i])); });
            return;
        }
        if (!a.up) {
            write(dgate, n, [=](int64_t i) { return widen(dz[i]) * Act::both(widen(gate[i])).slope; });
            return;
        }
        const T* up = row_of<T>(a.up, a.up_stride, row, column);
        // The exponential is the cost: the activation is kept for dup while dgate is written, a tile at a time.
        constexpr int64_t tile = 256;
        C act[tile];
        for (int64_t begin = 0; begin < n; begin += tile) {
            const int64_t m = smaller(n - begin, tile);
            const T *g_ = gate + begin, *u_ = up + begin, *d_ = dz + begin;
            write(dgate + begin, m, [=, &act](int64_t i) {
                const Activated<C> activated = Act::both(widen(g_[i]));
                act[i] = activated.value;
                return widen(d_[i]) * widen(u_[i]) * activated.slope;
            });
            if (dup) write(dup + begin, m, [=, &act](int64_t i) { return widen(d_[i]) * act[i]; });
        }
    });
}

template <class F>
void with_activation(Activation kind, F f) {
    switch (kind) {
        case Activation::silu: return f(Silu{});
        case Activation::gelu_tanh: return f(GeluTanh{});
        case Activation::gelu: return f(Gelu{});
        case Activation::relu: return f(Relu{});
        case Activation::relu2: return f(Relu2{});
    }
}

void gated_activation(const GatedActivation& a) {
    with_type(a.dtype, [&](auto element) {
        with_activation(a.kind, [&](auto act) { forward<decltype(element), decltype(act)>(a); });
    });
}

void gated_activation_backward(const GatedActivationBackward& a) {
    with_type(a.dtype, [&](auto element) {
        with_activation(a.kind, [&](auto act) { backward<decltype(element), decltype(act)>(a); });
    });
}

#define FIELD(name) COGSYM_FIELD(GatedActivation, name)
constexpr Field forward_fields[] = {FIELD(gate), FIELD(gate_stride), FIELD(up),    FIELD(up_stride),  FIELD(z), FIELD(rows),
                                    FIELD(F),    FIELD(kind),        FIELD(dtype), FIELD(num_threads)};
#undef FIELD
#define FIELD(name) COGSYM_FIELD(GatedActivationBackward, name)
constexpr Field backward_fields[] = {
    FIELD(dz), FIELD(dz_stride), FIELD(gate), FIELD(gate_stride), FIELD(up), FIELD(up_stride), FIELD(dgate), FIELD(dup),
    FIELD(gradient_stride), FIELD(rows), FIELD(F), FIELD(kind), FIELD(dtype), FIELD(num_threads)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(activation) = {
    kernel<gated_activation>("gated_activation", "z = act(gate) * up, or act(gate) where up is 0.", forward_fields),
    kernel<gated_activation_backward>("gated_activation_backward", "dgate and dup, each unless its address is 0.",
                                      backward_fields),
    {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
