// What the norms share: sums over rows that are precise, and sums over columns that do not depend on the threads.
#pragma once

#include "scratch.h"

namespace cogsym {
namespace COGSYM_ISA {

// Σ f(i). Long sums are sums of sums of 256 elements: the error grows with the longest chain of additions.
template <class C, class F>
inline C row_sum(int64_t D, F f) {
    constexpr int64_t block = 256;
    C total = 0;
    for (int64_t begin = 0; begin < D; begin += block) {
        const int64_t end = smaller(begin + block, D);
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; ++i) sum += f(i);
        total += sum;
    }
    return total;
}

// A gradient of a parameter is summed over blocks of rows whose size does not depend on the number of threads, and so
// neither does the gradient: short ones, for its precision, but at most 512, for the scratch's size.
struct RowBlocks {
    int64_t rows, size, count;
    explicit RowBlocks(int64_t rows) : rows(rows), size(larger((rows + 511) / 512, 16)), count((rows + size - 1) / size) {}
    int64_t begin(int64_t block) const { return block * size; }
    int64_t end(int64_t block) const { return smaller((block + 1) * size, rows); }
};

// to[D] = Σ_blocks partials[block · stride + i], in the order of the blocks and in double.
template <class C>
inline void sum_partials(void* to, DType dtype, const C* partials, int64_t count, int64_t stride, int64_t D,
                         int num_threads) {
    constexpr int64_t tile = 256;
    with_type(dtype, [&](auto element) {
        using W = decltype(element);
        parallel_for((D + tile - 1) / tile, count * D, num_threads, [&](int64_t t) {
            const int64_t begin = t * tile, n = smaller(D - begin, tile);
            double total[tile] = {};
            for (int64_t b = 0; b < count; ++b) {
                const C* partial = partials + b * stride + begin;
#pragma omp simd
                for (int64_t i = 0; i < n; ++i) total[i] += partial[i];
            }
            write(static_cast<W*>(to) + begin, n, [&](int64_t i) { return compute_t<W>(total[i]); });
        });
    });
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
