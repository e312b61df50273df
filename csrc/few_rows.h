// Products of few rows of x with a weight of many, which is read once, where it lies, at the speed of memory.
#pragma once

#include "product.h"

namespace cogsym {
namespace COGSYM_ISA {

// Two vectors of weights. Those of bfloat16 are the even ones and the odd ones of as many words, which takes no
// shuffling; `arrange` lays x out alike.
struct Pair {
    floats first, second;
};
constexpr int64_t pair = 2 * lanes<float>;
template <class W>
inline Pair pair_of(const W* from) {
    return {widened(from), widened(from + lanes<float>)};
}
template <>
inline Pair pair_of(const bfloat16* from) {
    const auto words = load<vector_t<uint32_t>>(from);
    return {(floats)(words << 16), (floats)(words & 0xffff0000u)};
}

template <class W>
constexpr bool in_words = false;
template <>
constexpr bool in_words<bfloat16> = true;

template <class W, class T>
inline void arrange(float* to, const T* x, int64_t n) {
    for (int64_t k = 0; k < round_up(n, pair); ++k) {
        const int64_t i = k % pair, place = in_words<W> ? i / 2 + i % 2 * lanes<float> : i;
        to[k - i + place] = k < n ? float(widen(x[k])) : 0;
    }
}

// Products of `rows` arranged rows of x with `columns` rows of the weight.
template <int rows, int columns, class W>
inline void dots(float (&out)[rows][columns], const float* x, int64_t x_stride, const W* weight, int64_t weight_stride,
                 int64_t K) {
    floats sums[rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) sums[r][c] = floats{};
    const auto add = [&](int64_t k, auto read) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) {
            const Pair w = read(weight + c * weight_stride + k);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                sums[r][c] += w.first * load<floats>(x + r * x_stride + k);
                sums[r][c] += w.second * load<floats>(x + r * x_stride + k + lanes<float>);
            }
        }
    };
    int64_t k = 0;
    for (; k + pair <= K; k += pair) add(k, [](const W* from) { return pair_of(from); });
    if (k < K)
        add(k, [&](const W* from) { return pair_of<W>(Some<pair, W>(from, K - k).values); });
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) out[r][c] = sum_of<float>(sums[r][c]);
}

// Two weights, in every lane.
template <class W>
inline Pair spread(const W* from) {
    return {widen(from[0]) - floats{}, widen(from[1]) - floats{}};
}
template <>
inline Pair spread(const bfloat16* from) {
#if defined(__AVX512F__)
    const auto words = (vector_t<uint32_t>)_mm512_set1_epi32(int(load<uint32_t>(from)));
#elif defined(__AVX__)
    auto words = (vector_t<uint32_t>)_mm256_broadcast_ss((const float*)from);
    // Or GCC takes the word apart first, and each of its halves has a long way to the lanes.
    __asm__("" : "+x"(words));
    // Shuffled, not shifted, as a shift would take a multiplier's place.
    const __m256i low = _mm256_set1_epi32(0x01008080);
    return {(floats)_mm256_shuffle_epi8((__m256i)words, low), (floats)(words & 0xffff0000u)};
#else
    const auto words = load<uint32_t>(from) - vector_t<uint32_t>{};
#endif
    return {(floats)(words << 16), (floats)(words & 0xffff0000u)};
}

// Products of as many rows of x as `vectors` hold with `columns` rows of the weight: x is packed as a panel, a weight is
// multiplied with all its rows at once.
template <int vectors, int columns, class W>
inline void spread_products(float (&out)[columns][width], const float* x, const W* weight, int64_t weight_stride,
                            int64_t K) {
    floats sums[columns][vectors];
#pragma GCC unroll 32
    for (int c = 0; c < columns; ++c)
        for (int v = 0; v < vectors; ++v) sums[c][v] = floats{};
    int64_t k = 0;
    for (; k + 2 <= K; k += 2)
#pragma GCC unroll 32
        for (int c = 0; c < columns; ++c) {
            const Pair w = spread(weight + c * weight_stride + k);
            for (int v = 0; v < vectors; ++v) {
                sums[c][v] += w.first * load<floats>(x + k * width + v * lanes<float>);
                sums[c][v] += w.second * load<floats>(x + (k + 1) * width + v * lanes<float>);
            }
        }
#pragma GCC unroll 32
    for (int c = 0; c < columns; ++c)
        for (int v = 0; v < vectors; ++v) {
            if (k < K) sums[c][v] += widen(weight[c * weight_stride + k]) * load<floats>(x + k * width + v * lanes<float>);
            store(&out[c][v * lanes<float>], sums[c][v]);
        }
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
