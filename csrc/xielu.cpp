// xIELU: contract and formulas in cogsym/ops/xielu.py.

#include "scratch.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

struct Xielu {
    const void* x;  // [rows, F]
    int64_t x_stride;
    void* y;  // [rows, F] contiguous
    int64_t rows, F;
    double alpha_p, alpha_n, beta, eps;
    DType dtype;
    int num_threads;
};

struct XieluBackward {
    const void* dz;  // [rows, F]
    int64_t dz_stride;
    const void* x;  // [rows, F]
    int64_t x_stride;
    void* dx;       // [rows, F] contiguous, or null: not wanted
    void* dalphas;  // [2] of the compute type, or null: not wanted
    int64_t rows, F;
    double alpha_p, alpha_n, beta, eps;
    DType dtype;
    int num_threads;
    Scratch scratch;
};

template <class C>
struct Bend {
    C slope, value;  // e^x - 1, and e^x - 1 - x
};

// For x <= 0, each with its full relative precision: x = n ln 2 + r as in `exponential`, and with n = 0, near 0, x is r.
inline Bend<float> bend(float x) {
    const float shift = 0x1.8p23f;
    const float shifted = x * 1.44269504f + shift;
    const float n = shifted - shift;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float power = from_bits((to_bits(shifted) + 127) << 23), square = power * (p * r * r);
    const float rest = power * r, less = power - 1.0f;
    const bool far = x < -87.0f;
    return {far ? -1.0f : square + (rest + less), far ? -1.0f - x : square + ((rest - x) + less)};
}
inline Bend<double> bend(double x) {
    const double slope = __builtin_expm1(x);
    return {slope, slope - x};
}

// What does not depend on the element.
template <class C>
struct Constants {
    C alpha_p, alpha_n, beta, eps, at_eps;  // the last: e^eps - 1
    template <class A>
    explicit Constants(const A& a)
        : alpha_p(C(a.alpha_p)),
          alpha_n(C(a.alpha_n)),
          beta(C(a.beta)),
          eps(C(a.eps)),
          at_eps(C(__builtin_expm1(a.eps))) {}

    // e^min(x, eps) - 1 - x for x <= 0
    C bent(C x) const { return x > eps ? at_eps - x : bend(x).value; }
    C value(C x) const { return (x > 0 ? alpha_p * x * x : alpha_n * bent(x)) + beta * x; }
    C slope(C x) const {
        const C below = x >= eps ? C(-1) : bend(x).slope;
        return (x > 0 ? C(2) * alpha_p * x : alpha_n * below) + beta;
    }
};

template <class T>
void forward(const Xielu& a) {
    using C = compute_t<T>;
    const Constants<C> of(a);
    for_runs(a.rows, a.F, a.num_threads, [&, of](int64_t row, int64_t column, int64_t n, int64_t offset) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride + column;
        write(static_cast<T*>(a.y) + offset, n, [=](int64_t i) { return of.value(C(widen(x[i]))); });
    });
}

// What n elements add to the gradients of both alphas. Apart from the loop over runs: inlined into its two copies, for
// one thread and for several, it is vectorised in two ways, and the sums would depend on the threads.
template <class T, class C = compute_t<T>>
__attribute__((noinline)) void add_alphas(double* to, const T* x, const T* dz, int64_t n, Constants<C> of) {
    constexpr int64_t block = 256;  // sums of few, so that no chain of additions is long
    C values[block], grads[block];
    for (int64_t begin = 0; begin < n; begin += block) {
        const int64_t m = smaller(n - begin, block);
        double above = 0, below = 0;  // of either sign, so that what they leave may be far smaller than they
#pragma omp simd
        for (int64_t i = 0; i < m; ++i) {
            values[i] = widen(x[begin + i]);
            grads[i] = widen(dz[begin + i]);
        }
#pragma omp simd reduction(+ : above, below)
        for (int64_t i = 0; i < m; ++i) {
            const C v = values[i], square = v * v, bent = of.bent(v);
            above += v > 0 ? double(grads[i]) * double(square) : 0.0;
            below += v > 0 ? 0.0 : double(grads[i]) * double(bent);
        }
        to[0] += above;
        to[1] += below;
    }
}

template <class T>
int64_t backward(const XieluBackward& a) {
    using C = compute_t<T>;
    const int64_t pieces = (a.rows * a.F + run_piece - 1) / run_piece;
    Arena arena(a.scratch);
    double* partials = arena.take<double>(a.dalphas ? 2 * pieces : 0);
    if (!a.scratch) return arena.used();
    for (int64_t i = 0; a.dalphas && i < 2 * pieces; ++i) partials[i] = 0;

    const Constants<C> of(a);
    for_runs(a.rows, a.F, a.num_threads, [&, of](int64_t row, int64_t column, int64_t n, int64_t offset) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride + column;
        const T* dz = static_cast<const T*>(a.dz) + row * a.dz_stride + column;
        if (a.dx)
            write(static_cast<T*>(a.dx) + offset, n,
                  [=](int64_t i) { return widen(dz[i]) * of.slope(C(widen(x[i]))); });
        if (a.dalphas) add_alphas(partials + offset / run_piece * 2, x, dz, n, of);
    });
    if (a.dalphas) {
        double total[2] = {};
        for (int64_t i = 0; i < 2 * pieces; ++i) total[i % 2] += partials[i];
        for (int i = 0; i < 2; ++i) static_cast<C*>(a.dalphas)[i] = C(total[i]);
    }
    return 0;
}

void xielu(const Xielu& a) {
    with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

int64_t xielu_backward(const XieluBackward& a) {
    return with_type(a.dtype, [&](auto element) { return backward<decltype(element)>(a); });
}

#define FIELD(name) COGSYM_FIELD(Xielu, name)
constexpr Field forward_fields[] = {FIELD(x),       FIELD(x_stride), FIELD(y),    FIELD(rows), FIELD(F), FIELD(alpha_p),
                                    FIELD(alpha_n), FIELD(beta),     FIELD(eps),  FIELD(dtype), FIELD(num_threads)};
#undef FIELD
#define FIELD(name) COGSYM_FIELD(XieluBackward, name)
constexpr Field backward_fields[] = {
    FIELD(dz), FIELD(dz_stride), FIELD(x), FIELD(x_stride), FIELD(dx), FIELD(dalphas), FIELD(rows), FIELD(F),
    FIELD(alpha_p), FIELD(alpha_n), FIELD(beta), FIELD(eps), FIELD(dtype), FIELD(num_threads), FIELD(scratch)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(xielu) = {
    kernel<xielu>("xielu", "y = xielu(x).", forward_fields),
    kernel<xielu_backward>("xielu_backward", "dx and [dalpha_p, dalpha_n], each unless its address is 0.",
                           backward_fields),
    {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
