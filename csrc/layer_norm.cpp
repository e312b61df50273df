// Layer norm: contract and formulas in cogsym/ops/layer_norm.py.

#include "norm.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

struct LayerNorm {
    const void* x;  // [rows, D]
    int64_t x_stride;
    const void* residual;  // [rows, D], or null: then h is x and is not written
    int64_t residual_stride;
    const void* weight;  // [D]
    const void* bias;    // [D], or null: 0
    void* y;             // [rows, D] contiguous
    void* h;             // [rows, D] contiguous: x + residual
    int64_t rows, D;
    double eps, offset;
    DType dtype, weight_dtype;
    int num_threads;
    Scratch scratch;
};

struct LayerNormBackward {
    const void* dy;  // [rows, D]
    int64_t dy_stride;
    const void* h;  // [rows, D]
    int64_t h_stride;
    const void* dh;  // [rows, D], added to dx, or null
    int64_t dh_stride;
    const void* weight;  // [D]
    void* dx;            // [rows, D] contiguous, or null: not wanted
    void* dweight;       // [D], or null: not wanted
    void* dbias;         // [D], or null: not wanted
    int64_t rows, D;
    double eps, offset;
    DType dtype, weight_dtype;
    int num_threads;
    Scratch scratch;
};

template <class C>
struct Statistics {
    C mean, r;
};

// The squares are those of the centred row: mean(h²) - mean(h)² would cancel. Nearly equal values are summed as their
// differences from one of them; those of two bytes have digits to spare.
template <class T, class C = compute_t<T>>
Statistics<C> statistics(const T* h, int64_t D, double eps) {
    const C one = sizeof(T) == 2 ? C(0) : C(widen(h[0]));
    const C mean = one + row_sum<C>(D, [=](int64_t i) { return widen(h[i]) - one; }) / C(D);
    const C squares = row_sum<C>(D, [=](int64_t i) { return (widen(h[i]) - mean) * (widen(h[i]) - mean); });
    return {mean, C(1) / square_root(squares / C(D) + C(eps))};
}

template <class T>
int64_t forward(const LayerNorm& a) {
    using C = compute_t<T>;
    const int64_t D = a.D;
    Arena arena(a.scratch);
    C *gamma = arena.take<C>(D), *beta = arena.take<C>(D);
    if (!a.scratch) return arena.used();
    widen_table(gamma, a.weight, a.weight_dtype, D, C(1), C(a.offset));
    if (a.bias)
        widen_table(beta, a.bias, a.weight_dtype, D, C(1), C(0));
    else
        for (int64_t i = 0; i < D; ++i) beta[i] = 0;

    parallel_for(a.rows, a.rows * D, a.num_threads, [&](int64_t row) {
        const T* h = static_cast<const T*>(a.x) + row * a.x_stride;
        if (a.residual) {
            const T* x = h;
            const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
            T* sum = static_cast<T*>(a.h) + row * D;
            write(sum, D, [=](int64_t i) { return widen(x[i]) + widen(residual[i]); });
            h = sum;
        }
        const auto [mean, r] = statistics(h, D, a.eps);
        write(static_cast<T*>(a.y) + row * D, D,
              [=, m = mean, s = r](int64_t i) { return (widen(h[i]) - m) * s * gamma[i] + beta[i]; });
    });
    return 0;
}

template <class T>
int64_t backward(const LayerNormBackward& a) {
    using C = compute_t<T>;
    const int64_t D = a.D;
    const RowBlocks blocks(a.rows);
    Arena arena(a.scratch);
    C* gamma = arena.take<C>(D);
    C* partials = arena.take<C>(a.dweight || a.dbias ? blocks.count * 2 * D : 0);  // of dweight, then of dbias
    if (!a.scratch) return arena.used();
    widen_table(gamma, a.weight, a.weight_dtype, D, C(1), C(a.offset));

    parallel_for(blocks.count, a.rows * D, a.num_threads, [&](int64_t block) {
        C* dweight = a.dweight ? partials + block * 2 * D : nullptr;
        C* dbias = a.dbias ? partials + (block * 2 + 1) * D : nullptr;
        if (dweight || dbias)
            for (int64_t i = 0; i < 2 * D; ++i) partials[block * 2 * D + i] = 0;
        for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
            const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
            const T* h = static_cast<const T*>(a.h) + row * a.h_stride;
            const Statistics<C> of = statistics(h, D, a.eps);
            const C mean = of.mean, r = of.r;
            if (a.dx) {
                const C sum = row_sum<C>(D, [=](int64_t i) { return widen(dy[i]) * gamma[i]; });
                const C dot =
                    row_sum<C>(D, [=](int64_t i) { return widen(dy[i]) * gamma[i] * ((widen(h[i]) - mean) * r); });
                const C shift = sum / C(D), scale = dot / C(D);
                const auto gradient = [=](int64_t i) {
                    return r * (widen(dy[i]) * gamma[i] - shift - (widen(h[i]) - mean) * r * scale);
                };
                T* dx = static_cast<T*>(a.dx) + row * D;
                if (a.dh) {
                    const T* dh = static_cast<const T*>(a.dh) + row * a.dh_stride;
                    write(dx, D, [=](int64_t i) { return gradient(i) + widen(dh[i]); });
                } else {
                    write(dx, D, gradient);
                }
            }
            if (dweight) {
#pragma omp simd
                for (int64_t i = 0; i < D; ++i) dweight[i] += widen(dy[i]) * ((widen(h[i]) - mean) * r);
            }
            if (dbias) {
#pragma omp simd
                for (int64_t i = 0; i < D; ++i) dbias[i] += widen(dy[i]);
            }
        }
    });
    if (a.dweight) sum_partials(a.dweight, a.weight_dtype, partials, blocks.count, 2 * D, D, a.num_threads);
    if (a.dbias) sum_partials(a.dbias, a.weight_dtype, partials + D, blocks.count, 2 * D, D, a.num_threads);
    return 0;
}

int64_t layer_norm(const LayerNorm& a) {
    return with_type(a.dtype, [&](auto element) { return forward<decltype(element)>(a); });
}

int64_t layer_norm_backward(const LayerNormBackward& a) {
    return with_type(a.dtype, [&](auto element) { return backward<decltype(element)>(a); });
}

#define FIELD(name) COGSYM_FIELD(LayerNorm, name)
constexpr Field forward_fields[] = {
    FIELD(x), FIELD(x_stride), FIELD(residual), FIELD(residual_stride), FIELD(weight), FIELD(bias), FIELD(y), FIELD(h),
    FIELD(rows), FIELD(D), FIELD(eps), FIELD(offset), FIELD(dtype), FIELD(weight_dtype), FIELD(num_threads),
    FIELD(scratch)};
#undef FIELD
#define FIELD(name) COGSYM_FIELD(LayerNormBackward, name)
constexpr Field backward_fields[] = {
    FIELD(dy), FIELD(dy_stride), FIELD(h), FIELD(h_stride), FIELD(dh), FIELD(dh_stride), FIELD(weight), FIELD(dx),
    FIELD(dweight), FIELD(dbias), FIELD(rows), FIELD(D), FIELD(eps), FIELD(offset), FIELD(dtype), FIELD(weight_dtype),
    FIELD(num_threads), FIELD(scratch)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(layer_norm) = {
    kernel<layer_norm>("layer_norm", "y (and h = x + residual where residual is not 0).", forward_fields),
    kernel<layer_norm_backward>("layer_norm_backward", "dx, dweight and dbias, each unless its address is 0.",
                                backward_fields),
    {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
