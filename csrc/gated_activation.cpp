// Gated activation: contract and formulas in cogsym/ops/activation.py.

#include "scalar.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

// Both activations are act(g) = g σ(s(g)), because (1 + tanh t) / 2 = σ(2t); so
// act'(g) = σ(s) + g σ(s) (1 - σ(s)) s'(g), and nothing cancels where the tanh is near -1.
struct Silu {
    template <class C>
    static C argument(C g) {
        return g;
    }
    template <class C>
    static C argument_slope(C) {
        return C(1);
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
    static C argument_slope(C g) {
        return C(scale) * (C(1) + C(3 * cubic) * g * g);
    }
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

// f(row, column, n, offset) for runs of n elements that lie in one row, offset being their place in a contiguous
// [rows, F]. Cut by elements, not by rows: decoding has one row.
template <class F>
void for_runs(int64_t rows, int64_t columns, int num_threads, F f) {
    constexpr int64_t piece = 4096;
    const int64_t total = rows * columns;
    parallel_for((total + piece - 1) / piece, total, num_threads, [&](int64_t p) {
        const int64_t end = (p + 1) * piece < total ? (p + 1) * piece : total;
        for (int64_t i = p * piece; i < end;) {
            const int64_t row = i / columns, column = i % columns;
            const int64_t n = columns - column < end - i ? columns - column : end - i;
            f(row, column, n, i);
            i += n;
        }
    });
}

template <class T, class Act>
void forward(const GatedActivation& a) {
    using C = compute_t<T>;
    for_runs(a.rows, a.F, a.num_threads, [&](int64_t row, int64_t column, int64_t n, int64_t offset) {
        const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + column;
        const T* up = static_cast<const T*>(a.up) + row * a.up_stride + column;
        write(static_cast<T*>(a.z) + offset, n, [=](int64_t i) {
            const C g = widen(gate[i]);
            return g * Sigmoid<C>(Act::argument(g)).value * widen(up[i]);
        });
    });
}

template <class T, class Act>
void backward(const GatedActivationBackward& a) {
    using C = compute_t<T>;
    for_runs(a.rows, a.F, a.num_threads, [&](int64_t row, int64_t column, int64_t n, int64_t) {
        const T* dz = static_cast<const T*>(a.dz) + row * a.dz_stride + column;
        const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + column;
        const T* up = static_cast<const T*>(a.up) + row * a.up_stride + column;
        const int64_t to = row * a.gradient_stride + column;
        T* dgate = a.dgate ? static_cast<T*>(a.dgate) + to : nullptr;
        T* dup = a.dup ? static_cast<T*>(a.dup) + to : nullptr;
        if (!dgate) {
            write(dup, n, [=](int64_t i) {
                const C g = widen(gate[i]);
                return widen(dz[i]) * (g * Sigmoid<C>(Act::argument(g)).value);
            });
            return;
        }
        // The sigmoid is the cost: kept for dup while dgate is written, a tile at a time.
        constexpr int64_t tile = 256;
        C act[tile];
        for (int64_t begin = 0; begin < n; begin += tile) {
            const int64_t m = n - begin < tile ? n - begin : tile;
            const T *g_ = gate + begin, *u_ = up + begin, *d_ = dz + begin;
            write(dgate + begin, m, [=, &act](int64_t i) {
                const C g = widen(g_[i]);
                const Sigmoid<C> sigmoid(Act::argument(g));
                act[i] = g * sigmoid.value;
                const C slope = sigmoid.value * (C(1) + g * sigmoid.complement * Act::argument_slope(g));
                return widen(d_[i]) * widen(u_[i]) * slope;
            });
            if (dup) write(dup + begin, m, [=, &act](int64_t i) { return widen(d_[i]) * act[i]; });
        }
    });
}

template <class F>
void with_activation(Activation activation, F f) {
    switch (activation) {
        case Activation::silu: return f(Silu{});
        case Activation::gelu_tanh: return f(GeluTanh{});
    }
}

}  // namespace

void gated_activation(const GatedActivation& a) {
    with_type(a.dtype, [&](auto element) {
        with_activation(a.activation, [&](auto act) { forward<decltype(element), decltype(act)>(a); });
    });
}

void gated_activation_backward(const GatedActivationBackward& a) {
    with_type(a.dtype, [&](auto element) {
        with_activation(a.activation, [&](auto act) { backward<decltype(element), decltype(act)>(a); });
    });
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
