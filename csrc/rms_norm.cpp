// Root-mean-square norm: contract and formulas in cogsym/ops/rms_norm.py.

#include "norm.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

struct RmsNorm {
    const void* x;  // [rows, D]
    int64_t x_stride;
    const void* residual;  // [rows, D], or null: then h is x and is not written
    int64_t residual_stride;
    const void* weight;  // [D]
    void* y;             // [rows, D] contiguous
    void* h;             // [rows, D] contiguous: x + residual
    int64_t rows, D;
    double eps, offset;
    DType dtype, weight_dtype;
    int num_threads;
    Scratch scratch;
};

struct RmsNormBackward {
    const void* dy;  // [rows, D]
    int64_t dy_stride;
    const void* h;  // [rows, D]
    int64_t h_stride;
    const void* dh;  // [rows, D], added to dx, or null
    int64_t dh_stride;
    const void* weight;  // [D]
    void* dx;            // [rows, D] contiguous, or null: not wanted
    void* dweight;       // [D], or null: not wanted
    int64_t rows, D;
    double eps, offset;
    DType dtype, weight_dtype;
    int num_threads;
    Scratch scratch;
};

template <class T, class C = compute_t<T>>
C inverse_rms(const T* h, int64_t D, double eps) {
    const C squares = row_sum<C>(D, [=](int64_t i) { return widen(h[i]) * widen(h[i]); });
    return C(1) / square_root(squares / C(D) + C(eps));
}

template <class T>
int64_t forward(const RmsNorm& a) {
    using C = compute_t<T>;
    const int64_t D = a.D;
    Arena arena(a.scratch);
    C* gamma = arena.take<C>(D);
    if (!a.scratch) return arena.used();
    widen_table(gamma, a.weight, a.weight_dtype, D, C(1), C(a.offset));

    parallel_for(a.rows, a.rows * D, a.num_threads, [&](int64_t row) {
        const T* h = static_cast<const T*>(a.x) + row * a.x_stride;
        if (a.residual) {
            const T* x = h;
            const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
            T* sum = static_cast<T*>(a.h) + row * D;
            write(sum, D, [=](int64_t i) { return widen(x[i]) + widen(residual[i]); });
            h = sum;
        }
        const C r = inverse_rms(h, D, a.eps);
        write(static_cast<T*>(a.y) + row * D, D, [=](int64_t i) { return widen(h[i]) * r * gamma[i]; });
    });
    return 0;
}

template <class T>
int64_t backward(const RmsNormBackward& a) {
    using C = compute_t<T>;
    const int64_t D = a.D;
    const RowBlocks blocks(a.rows);
    Arena arena(a.scratch);
    C* gamma = arena.take<C>(D);
    C* partials = arena.take<C>(a.dweight ? blocks.count * D : 0);
    if (!a.scratch) return arena.used();
    widen_table(gamma, a.weight, a.weight_dtype, D, C(1), C(a.offset));

    parallel_for(blocks.count, a.rows * D, a.num_threads, [&](int64_t block) {
        C* partial = a.dweight ? partials + block * D : nullptr;
        if (partial)
            for (int64_t i = 0; i < D; ++i) partial[i] = 0;
        for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
            const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
            const T* h = static_cast<const T*>(a.h) + row * a.h_stride;
            const C r = inverse_rms(h, D, a.eps);
            if (a.dx) {
                const C dot = row_sum<C>(D, [=](int64_t i) { return widen(dy[i]) * gamma[i] * widen(h[i]); });
                const C scale = r * r * r * (dot / C(D));
                T* dx = static_cast<T*>(a.dx) + row * D;
                if (a.dh) {
                    const T* dh = static_cast<const T*>(a.dh) + row * a.dh_stride;
                    write(dx, D, [=](int64_t i) {
                        return r * (widen(dy[i]) * gamma[i]) - widen(h[i]) * scale + widen(dh[i]);
                    });
                } else {
                    write(dx, D, [=](int64_t i) { return r * (widen(dy[i]) * gamma[i]) - widen(h[i]) * scale; });
                }
            }
            if (partial) {
#pragma omp simd
                for (int64_t i = 0; i < D; ++i) partial[i] += widen(dy[i]) * widen(h[i]) * r;
            }
        }
    });
    if (a.dweight) sum_partials(a.dweight, a.weight_dtype, partials, blocks.count, D, D, a.num_threads);
    return 0;
}

int64_t rms_norm(const RmsNorm& a) {
    return with_type(a.dtype, [&](auto element) { return forward<decltype(element)>(a); });
}

int64_t rms_norm_backward(const RmsNormBackward& a) {
    return with_type(a.dtype, [&](auto element) { return backward<decltype(element)>(a); });
}

#define FIELD(name) COGSYM_FIELD(RmsNorm, name)
constexpr Field forward_fields[] = {
    FIELD(x), FIELD(x_stride), FIELD(residual), FIELD(residual_stride), FIELD(weight), FIELD(y), FIELD(h), FIELD(rows),
    FIELD(D), FIELD(eps), FIELD(offset), FIELD(dtype), FIELD(weight_dtype), FIELD(num_threads), FIELD(scratch)};
#undef FIELD
#define FIELD(name) COGSYM_FIELD(RmsNormBackward, name)
constexpr Field backward_fields[] = {
    FIELD(dy), FIELD(dy_stride), FIELD(h), FIELD(h_stride), FIELD(dh), FIELD(dh_stride), FIELD(weight), FIELD(dx),
    FIELD(dweight), FIELD(rows), FIELD(D), FIELD(eps), FIELD(offset), FIELD(dtype), FIELD(weight_dtype),
    FIELD(num_threads), FIELD(scratch)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(rms_norm) = {
    kernel<rms_norm>("rms_norm", "y (and h = x + residual where residual is not 0).", forward_fields),
    kernel<rms_norm_backward>("rms_norm_backward", "dx and dweight, each unless its address is 0.", backward_fields),
    {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
