// Root-mean-square norm: contract and formulas in cogsym/ops/rms_norm.py.

#include "scalar.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

template <class C>
C inverse_rms(C sum_of_squares, int64_t D, double eps) {
    return C(1) / square_root(sum_of_squares / C(D) + C(eps));
}

// Long sums are sums of sums of this many elements: the error grows with the longest chain of additions.
constexpr int64_t sum_block = 256;

template <class T, class C = compute_t<T>>
C sum_of_squares(const T* h, int64_t D) {
    C total = 0;
    for (int64_t begin = 0; begin < D; begin += sum_block) {
        const int64_t end = D - begin < sum_block ? D : begin + sum_block;
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; ++i) sum += widen(h[i]) * widen(h[i]);
        total += sum;
    }
    return total;
}

// Σ dy γ h
template <class T, class C = compute_t<T>>
C weighted_dot(const T* dy, const C* gamma, const T* h, int64_t D) {
    C total = 0;
    for (int64_t begin = 0; begin < D; begin += sum_block) {
        const int64_t end = D - begin < sum_block ? D : begin + sum_block;
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; ++i) sum += widen(dy[i]) * gamma[i] * widen(h[i]);
        total += sum;
    }
    return total;
}

template <class T>
void forward(const RmsNorm& a) {
    using C = compute_t<T>;
    const int64_t D = a.D;
    C* gamma = static_cast<C*>(a.gamma);
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
        const C r = inverse_rms(sum_of_squares(h, D), D, a.eps);
        write(static_cast<T*>(a.y) + row * D, D, [=](int64_t i) { return widen(h[i]) * r * gamma[i]; });
    });
}

// dweight = Σ_blocks partials, in the order of the blocks and in double.
template <class C>
void sum_partials(const RmsNormBackward& a) {
    constexpr int64_t tile = 256;
    const C* partials = static_cast<const C*>(a.partials);
    with_type(a.weight_dtype, [&](auto element) {
        using W = decltype(element);
        parallel_for((a.D + tile - 1) / tile, a.num_blocks * a.D, a.num_threads, [&](int64_t t) {
            const int64_t begin = t * tile, n = a.D - begin < tile ? a.D - begin : tile;
            double total[tile] = {};
            for (int64_t b = 0; b < a.num_blocks; ++b) {
                const C* partial = partials + b * a.D + begin;
#pragma omp simd
                for (int64_t i = 0; i < n; ++i) total[i] += partial[i];
            }
            write(static_cast<W*>(a.dweight) + begin, n, [&](int64_t i) { return compute_t<W>(total[i]); });
        });
    });
}

// Rows are cut into blocks whose size does not depend on the number of threads, and so neither does dweight.
template <class T>
void backward(const RmsNormBackward& a) {
    using C = compute_t<T>;
    const int64_t D = a.D;
    C* gamma = static_cast<C*>(a.gamma);
    widen_table(gamma, a.weight, a.weight_dtype, D, C(1), C(a.offset));

    parallel_for(a.num_blocks, a.rows * D, a.num_threads, [&](int64_t block) {
        C* partial = a.dweight ? static_cast<C*>(a.partials) + block * D : nullptr;
        if (partial)
            for (int64_t i = 0; i < D; ++i) partial[i] = 0;
        const int64_t begin = block * a.block_rows;
        const int64_t end = begin + a.block_rows < a.rows ? begin + a.block_rows : a.rows;
        for (int64_t row = begin; row < end; ++row) {
            const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
            const T* h = static_cast<const T*>(a.h) + row * a.h_stride;
            const C r = inverse_rms(sum_of_squares(h, D), D, a.eps);
            if (a.dx) {
                const C scale = r * r * r * (weighted_dot(dy, gamma, h, D) / C(D));
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
    if (a.dweight) sum_partials<C>(a);
}

}  // namespace

void rms_norm(const RmsNorm& a) {
    with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void rms_norm_backward(const RmsNormBackward& a) {
    with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
