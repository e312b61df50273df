// Products of matrices of any element type in float, compiled once for every instruction set: operands are widened while
// a block of them is packed, and the packed blocks are multiplied by multiply-adds that keep a tile of the outcome in
// registers (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
//
// In C = A B, A is packed into strips of `strip` rows, [rows / strip][depth][strip], and B into panels of `width`
// columns, [columns / width][depth][width], both padded with zeros. A panel of B then lies in the first cache, a block
// of A in the second.
#pragma once

#include "packing.h"
#include "scratch.h"

namespace cogsym {
namespace COGSYM_ISA {

// A tile of strip x width sums, a row of B's panel and one value of A fill the registers: 32 with AVX-512 and NEON, else
// 16.
#if defined(__AVX512F__)
constexpr int strip = 14, tile_vectors = 2;
#elif defined(__AVX__)
constexpr int strip = 6, tile_vectors = 2;
#elif defined(__aarch64__)
constexpr int strip = 4, tile_vectors = 4;
#else
constexpr int strip = 4, tile_vectors = 2;
#endif
constexpr int64_t width = tile_vectors * lanes<float>;
static_assert(strip <= lanes<float>, "a strip is packed by transposing squares of vectors");

// A vector's worth of values as floats.
template <class T>
inline floats widened(const T* from) {
    floats x;
    for (int64_t i = 0; i < lanes<float>; ++i) x[i] = widen(from[i]);
    return x;
}
template <>
inline floats widened(const float* from) {
    return load<floats>(from);
}
#if defined(__AVX512F__)
template <>
inline floats widened(const bfloat16* from) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
}
template <>
inline floats widened(const float16* from) {
    return (floats)_mm512_cvtph_ps(load<__m256i>(from));
}
template <>
inline floats widened(const int8_t* from) {
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
}
#elif defined(__AVX2__)
template <>
inline floats widened(const bfloat16* from) {
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16);
}
template <>
inline floats widened(const float16* from) {
    return (floats)_mm256_cvtph_ps(load<__m128i>(from));
}
template <>
inline floats widened(const int8_t* from) {
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(from))));
}
#elif defined(__aarch64__)
template <>
inline floats widened(const bfloat16* from) {
    return (floats)vshll_n_u16(load<uint16x4_t>(from), 16);
}
template <>
inline floats widened(const float16* from) {
    return (floats)vcvt_f32_f16(load<float16x4_t>(from));
}
template <>
inline floats widened(const int8_t* from) {
    return (floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(load<uint32_t>(from))))));
}
#endif

// Whether values of a type are integers, to be multiplied by a scale of their row.
template <class T>
constexpr bool quantised = false;
template <>
constexpr bool quantised<int8_t> = true;

// The first `count` of n values, then zeros.
template <std::size_t n, class T>
struct Some {
    alignas(64) T values[n];
    Some(const T* from, int64_t count) {
        for (std::size_t i = 0; i < n; ++i) values[i] = int64_t(i) < count ? from[i] : T{};
    }
};
template <class T>
inline floats widened(const T* from, int64_t count) {
    return count >= lanes<float> ? widened(from) : widened<T>(Some<lanes<float>, T>(from, count).values);
}

// rows[j][i] = rows[i][j].
inline void transpose(floats (&rows)[lanes<float>]) {
#if defined(__AVX512F__)
    transpose_words(rows, lanes<float>, rows, lanes<float>);
#elif defined(__AVX2__)
    __m256 pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            const __m256d low = (__m256d)pairs[i + j], high = (__m256d)pairs[i + 2 + j];
            quads[i + 2 * j] = (__m256)_mm256_unpacklo_pd(low, high);
            quads[i + 2 * j + 1] = (__m256)_mm256_unpackhi_pd(low, high);
        }
    for (int i = 0; i < 4; ++i) {
        rows[i] = (floats)_mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20);
        rows[4 + i] = (floats)_mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31);
    }
#else
    floats turned[lanes<float>];
    for (int64_t i = 0; i < lanes<float>; ++i)
        for (int64_t j = 0; j < lanes<float>; ++j) turned[j][i] = rows[i][j];
    __builtin_memcpy(rows, turned, sizeof turned);
#endif
}

// Values beyond the last strip that packing it may write.
constexpr int64_t strip_slack = lanes<float>;

// A strip's part of as many columns as a vector has lanes, from its rows. A row of it is shorter than a vector: the next
// one overwrites what is too much.
inline void store_strip(float* to, floats (&rows)[lanes<float>], int64_t columns) {
    transpose(rows);
    for (int64_t j = 0; j < columns; ++j) store(to + j * strip, rows[j]);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// Four rows and two, each without what they do not have.
inline void store_strip(float* to, const floats (&rows)[strip]) {
    for (int half = 0; half < 2; ++half) {
        const auto unpack = [&](int i, int j) {
            return half ? _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[j])
                        : _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[j]);
        };
        const __m256d low = (__m256d)unpack(0, 1), high = (__m256d)unpack(2, 3), last = (__m256d)unpack(4, 5);
        const __m256 four[2] = {(__m256)_mm256_unpacklo_pd(low, high), (__m256)_mm256_unpackhi_pd(low, high)};
        for (int odd = 0; odd < 2; ++odd)
            for (int lane = 0; lane < 2; ++lane) {
                float* const column = to + (4 * lane + 2 * half + odd) * strip;
                const __m128d two = lane ? _mm256_extractf128_pd(last, 1) : _mm256_castpd256_pd128(last);
                store(column, lane ? _mm256_extractf128_ps(four[odd], 1) : _mm256_castps256_ps128(four[odd]));
                if (odd)
                    _mm_storeh_pd(reinterpret_cast<double*>(column + 4), two);
                else
                    _mm_storel_pd(reinterpret_cast<double*>(column + 4), two);
            }
    }
}
#endif

// Strips of a's rows [row, row + count) and columns [column, column + depth).
template <class T>
inline void pack_strips(float* to, const Rows<T>& a, int64_t row, int64_t count, int64_t column, int64_t depth) {
    for (int64_t s = row; s < row + count; s += strip, to += strip * depth) {
        const int64_t rows = smaller(strip, row + count - s);
        for (int64_t k = 0; k < depth; k += lanes<float>) {
            const int64_t columns = smaller(lanes<float>, depth - k);
            const T* const from = a.data + s * a.stride + column + k;
#if defined(__AVX2__) && !defined(__AVX512F__)
            if (rows == strip && columns == lanes<float>) {
                floats whole[strip];
                for (int64_t r = 0; r < strip; ++r) whole[r] = widened(from + r * a.stride);
                store_strip(to + k * strip, whole);
                continue;
            }
#endif
            floats square[lanes<float>] = {};
            for (int64_t r = 0; r < rows; ++r) square[r] = widened(from + r * a.stride, columns);
            store_strip(to + k * strip, square, columns);
        }
    }
}

// Panels of b's columns [column, column + count) and rows [row, row + depth); `scales` are those of b's rows.
template <class T>
inline void pack_panels(float* to, const Rows<T>& b, int64_t row, int64_t depth, int64_t column, int64_t count,
                        const float* scales = nullptr) {
    for (int64_t p = column; p < column + count; p += width, to += width * depth) {
        const int64_t columns = smaller(width, column + count - p);
        for (int64_t k = 0; k < depth; ++k) {
            const T* from = b.data + (row + k) * b.stride + p;
            for (int64_t v = 0; v < width; v += lanes<float>) {
                floats values = widened(from + v, columns - v);
                if constexpr (quantised<T>) values *= scales[row + k];
                store(to + k * width + v, values);
            }
        }
    }
}

// The same of b's transpose: b's rows [column, column + count) and columns [row, row + depth).
template <class T>
inline void pack_panels_transposed(float* to, const Rows<T>& b, int64_t row, int64_t depth, int64_t column,
                                   int64_t count, const float* scales = nullptr) {
    for (int64_t p = column; p < column + count; p += lanes<float>) {
        const int64_t rows = smaller(lanes<float>, column + count - p);
        float* const panel = to + (p - column) / width * width * depth + (p - column) % width;
        for (int64_t k = 0; k < depth; k += lanes<float>) {
            const int64_t columns = smaller(lanes<float>, depth - k);
            floats square[lanes<float>] = {};
            for (int64_t r = 0; r < rows; ++r) {
                square[r] = widened(b.data + (p + r) * b.stride + row + k, columns);
                if constexpr (quantised<T>) square[r] *= scales[p + r];
            }
            transpose(square);
            for (int64_t j = 0; j < columns; ++j) store(panel + (k + j) * width, square[j]);
        }
    }
}
// Two of bfloat16 are turned as one word, and widened where they come to lie.
template <>
inline void pack_panels_transposed(float* to, const Rows<bfloat16>& b, int64_t row, int64_t depth, int64_t column,
                                   int64_t count, const float*) {
    using words = vector_t<uint32_t>;
    constexpr int64_t step = 2 * lanes<float>;
    for (int64_t p = column; p < column + count; p += lanes<float>) {
        const int64_t rows = smaller(lanes<float>, column + count - p);
        float* const panel = to + (p - column) / width * width * depth + (p - column) % width;
        for (int64_t k = 0; k < depth; k += step) {
            const int64_t columns = smaller(step, depth - k);
            floats square[lanes<float>] = {};
            for (int64_t r = 0; r < rows; ++r) {
                const bfloat16* from = b.data + (p + r) * b.stride + row + k;
                square[r] = load<floats>(columns == step ? from : Some<step, bfloat16>(from, columns).values);
            }
            transpose(square);
            for (int64_t j = 0; j < columns; j += 2) {
                store(panel + (k + j) * width, (floats)((words)square[j / 2] << 16));
                if (j + 1 < columns) store(panel + (k + j + 1) * width, (floats)((words)square[j / 2] & 0xffff0000u));
            }
        }
    }
}

// rows x columns of c = (add ? c : 0) + a b for one strip of a and one panel of b.
inline void multiply_tile(float* c, int64_t c_stride, int64_t rows, int64_t columns, const float* a, const float* b,
                          int64_t depth, bool add) {
    floats sums[strip][tile_vectors];
    for (int64_t r = 0; r < rows; ++r) {
        __builtin_prefetch(c + r * c_stride, 1);
        __builtin_prefetch(c + r * c_stride + columns - 1, 1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < strip; ++r)
        for (int v = 0; v < tile_vectors; ++v) sums[r][v] = floats{};
    for (int64_t k = 0; k < depth; ++k) {
        floats right[tile_vectors];
        for (int v = 0; v < tile_vectors; ++v) right[v] = load<floats>(b + k * width + v * lanes<float>);
#pragma GCC unroll 16
        for (int r = 0; r < strip; ++r)
            for (int v = 0; v < tile_vectors; ++v) sums[r][v] += a[k * strip + r] * right[v];
    }
    // Added last: the error of a sum of sums is smaller than that of one long chain.
    if (rows == strip && columns == width) {
#pragma GCC unroll 16
        for (int r = 0; r < strip; ++r)
            for (int v = 0; v < tile_vectors; ++v) {
                float* out = c + r * c_stride + v * lanes<float>;
                store(out, add ? load<floats>(out) + sums[r][v] : sums[r][v]);
            }
        return;
    }
    alignas(64) float tile[strip][width];
#pragma GCC unroll 16
    for (int r = 0; r < strip; ++r)
        for (int v = 0; v < tile_vectors; ++v) store(&tile[r][v * lanes<float>], sums[r][v]);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < columns; ++i) c[r * c_stride + i] = (add ? c[r * c_stride + i] : 0) + tile[r][i];
}

// c[rows, columns] = (add ? c : 0) + a b for packed a and b.
inline void multiply_packed(float* c, int64_t c_stride, int64_t rows, int64_t columns, const float* a, const float* b,
                            int64_t depth, bool add) {
    for (int64_t j = 0; j < columns; j += width)
        for (int64_t i = 0; i < rows; i += strip)
            multiply_tile(c + i * c_stride + j, c_stride, smaller(strip, rows - i), smaller(width, columns - j),
                          a + i * depth, b + j * depth, depth, add);
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
