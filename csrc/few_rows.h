// Products of few rows of x with a weight of many, which is read once, where it lies, at the speed of memory.
#pragma once

#include "matrix.h"
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

// Whether rows of x of type T meet such weights as whole numbers, in tiles: each value of x as three digits of 8 bits,
// x = unit (65536 d2 + 256 d1 + d0), the row's largest of 22 bits. A weight is then multiplied as it lies, sums are
// exact, and what is lost of x is less than float sums lose: halves of its unit. A row with what is not finite is NaN.
template <class T, class W>
constexpr bool in_digits = false;
constexpr int64_t digits = 3, tile = 16, tile_depth = 64, most_tiles = 6;

// Products of the digits of x, [K / 64][tiles][16][16 digits][4], with 16 rows of the weight.
template <int tiles>
void digit_products(int32_t (&out)[most_tiles * tile][tile], const int8_t* x, const int8_t* weight, int64_t stride,
                    int64_t rows, int64_t K);

#ifdef __AMX_INT8__
template <>
constexpr bool in_digits<bfloat16, int8_t> = true;

// A row's digits as columns `digits` m and following of the right operand; its unit.
inline float arrange_digits(int8_t* to, const bfloat16* x, int64_t K, int64_t tiles, int64_t m) {
    using ints = vector_t<int32_t>;
    const auto sized = [](uint16_t bits) { return uint16_t(bits & 0x7fff); };
    uint16_t largest = 0;  // of the magnitudes, which are ordered as their bits are
    for (int64_t k = 0; k < K; ++k) {
        const uint16_t size = sized(load<uint16_t>(x + k));
        largest = size > largest ? size : largest;
    }
    const bool finite = largest < Bits<bfloat16>::exponent;
    // 2^exponent is more than the largest; for tiny ones the unit's inverse would be infinite.
    const int exponent = finite ? int(larger(largest >> 7, 26)) - 126 : 0;
    const float inverse = finite ? __builtin_ldexpf(1, 22 - exponent) : 0;
    for (int64_t begin = 0; begin < K; begin += tile_depth, to += tiles * tile * tile_depth) {
        const Some<tile_depth, bfloat16> some(x + begin, finite ? K - begin : 0);
        alignas(64) int8_t values[digits][tile_depth];
        for (int64_t i = 0; i < tile_depth; i += lanes<float>) {
            const __m512 scaled = (__m512)(widened(some.values + i) * inverse);
            const ints whole = (ints)_mm512_cvtps_epi32(scaled), low = whole << 24 >> 24, rest = (whole - low) >> 8,
                       middle = rest << 24 >> 24;
            store(values[0] + i, _mm512_cvtepi32_epi8((__m512i)low));
            store(values[1] + i, _mm512_cvtepi32_epi8((__m512i)middle));
            store(values[2] + i, _mm512_cvtepi32_epi8((__m512i)((rest - middle) >> 8)));
        }
        for (int64_t d = 0; d < digits; ++d) {
            const int64_t column = digits * m + d;
            int8_t* const place = to + column / tile * tile * tile_depth + column % tile * 4;
            for (int64_t i = 0; i < tile_depth; i += 4) __builtin_memcpy(place + i * tile, values[d] + i, 4);
        }
    }
    return finite ? __builtin_ldexpf(1, exponent - 22) : __builtin_nanf("");
}

template <int tiles>
inline void digit_products(int32_t (&out)[most_tiles * tile][tile], const int8_t* x, const int8_t* weight, int64_t stride,
                           int64_t rows, int64_t K) {
    static_assert(most_tiles == 6, "tiles 0 to 5 hold sums, 6 weights and 7 digits");
    alignas(64) int8_t some[tile][tile_depth];
    _tile_zero(0);
    if constexpr (tiles > 1) _tile_zero(1);
    if constexpr (tiles > 2) _tile_zero(2);
    if constexpr (tiles > 3) _tile_zero(3);
    if constexpr (tiles > 4) _tile_zero(4);
    if constexpr (tiles > 5) _tile_zero(5);
    for (int64_t k = 0; k < K; k += tile_depth, x += tiles * tile * tile_depth) {
        const int8_t* const from = weight + k;
        if (rows < tile || k + tile_depth > K) {  // what is not the weight's is not read
            const int64_t count = smaller(tile_depth, K - k);
            for (int64_t r = 0; r < tile; ++r)
                for (int64_t i = 0; i < tile_depth; ++i) some[r][i] = r < rows && i < count ? from[r * stride + i] : 0;
            __asm__ volatile("" ::: "memory");  // as in matrix.h
            _tile_loadd(6, some, tile_depth);
        } else {
            for (int64_t r = 0; r < tile; ++r) __builtin_prefetch(from + (tile + r) * stride);
            __asm__ volatile("" ::: "memory");
            _tile_loadd(6, from, stride);
        }
#define COGSYM_DIGITS(i)                                               \
    if constexpr (tiles > i) {                                         \
        _tile_loadd(7, x + i * tile * tile_depth, tile_depth);         \
        _tile_dpbssd(i, 6, 7);                                         \
    }
        COGSYM_DIGITS(0)
        COGSYM_DIGITS(1)
        COGSYM_DIGITS(2)
        COGSYM_DIGITS(3)
        COGSYM_DIGITS(4)
        COGSYM_DIGITS(5)
#undef COGSYM_DIGITS
    }
    alignas(64) int32_t sums[most_tiles][tile][tile];
    constexpr int64_t line = tile * sizeof(int32_t);
    _tile_stored(0, sums[0], line);
    if constexpr (tiles > 1) _tile_stored(1, sums[1], line);
    if constexpr (tiles > 2) _tile_stored(2, sums[2], line);
    if constexpr (tiles > 3) _tile_stored(3, sums[3], line);
    if constexpr (tiles > 4) _tile_stored(4, sums[4], line);
    if constexpr (tiles > 5) _tile_stored(5, sums[5], line);
    __asm__ volatile("" ::: "memory");
    for (int i = 0; i < tiles; ++i) transpose_words(out[i * tile], tile, sums[i], tile);
}
#endif

}  // namespace COGSYM_ISA
}  // namespace cogsym
