// How the operands of the products in matrix.h lie in memory, and how they get there.
//
// An operand is stored as panels of 32 columns, [columns / 32][rows][32], its dimensions padded with zeros to
// multiples of 32. In A · B the inner dimension is A's columns and B's rows. Instructions that multiply bfloat16 add
// the products of two neighbours of the inner dimension, so that B's rows are interleaved two by two: [columns /
// 32][rows / 2][32][2]. One layout thus serves AMX (a tile is 16 lines of 64 contiguous bytes), AVX-512's vdpbf16ps,
// Arm's BFDOT and plain multiply-add.
#pragma once

#include "vector.h"

namespace cogsym {
namespace COGSYM_ISA {

constexpr int64_t panel = 32;

inline int64_t round_up(int64_t n, int64_t unit = panel) { return (n + unit - 1) / unit * unit; }

// What values of type T are multiplied as; the sums are of compute_t<T>.
template <class T>
struct operand {
    using type = compute_t<T>;
};
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct operand<bfloat16> {
    using type = bfloat16;
};
#endif
template <class T>
using operand_t = typename operand<T>::type;

// How many rows of B are interleaved.
template <class E>
constexpr int64_t interleaved = sizeof(E) == 2 ? 2 : 1;

// Where (row, column) of a packed operand with `rows` rows begins; the column is a multiple of 32, and so is the row
// where rows are interleaved.
inline int64_t packed(int64_t rows, int64_t row, int64_t column) { return (column / panel * rows + row) * panel; }

// A value's bits, and those that are all set where it is infinite or NaN.
template <class T>
struct Bits {
    using type = uint16_t;
    static constexpr type exponent = 0x7f80;
};
template <>
struct Bits<float16> {
    using type = uint16_t;
    static constexpr type exponent = 0x7c00;
};
template <>
struct Bits<float> {
    using type = uint32_t;
    static constexpr type exponent = 0x7f800000;
};
template <>
struct Bits<double> {
    using type = uint64_t;
    static constexpr type exponent = 0x7ff0000000000000;
};

template <class T>
inline bool is_finite(T x) {
    typename Bits<T>::type bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return (bits & Bits<T>::exponent) != Bits<T>::exponent;
}

// A strided matrix of a tensor's values.
template <class T>
struct Rows {
    const T* data;
    int64_t stride, rows, columns;
};

// 32 x 32 values as operands, with zeros beyond the matrix. Where an operand meets exact zeros (probabilities of keys
// that a query does not see), 0 · NaN must not spread: `finite` replaces what is not finite by 0. Returns whether there
// was any of it.
template <class E, class T>
inline bool read_block(E (&block)[panel][panel], const Rows<T>& x, int64_t row, int64_t column, bool finite) {
    const int64_t rows = x.rows - row < panel ? x.rows - row : panel;
    const int64_t columns = x.columns - column < panel ? x.columns - column : panel;
    typename Bits<T>::type replaced = 0;
    for (int64_t r = 0; r < panel; ++r) {
        typename Bits<T>::type bits[panel] = {};
        const T* from = x.data + (row + r) * x.stride + column;
        if (r < rows && columns == panel)
            __builtin_memcpy(bits, from, sizeof bits);
        else if (r < rows)
            __builtin_memcpy(bits, from, std::size_t(columns) * sizeof(T));
        if (finite) {
            constexpr auto exponent = Bits<T>::exponent;
#pragma omp simd reduction(| : replaced)
            for (int64_t i = 0; i < panel; ++i) {
                const bool finite_value = (bits[i] & exponent) != exponent;
                replaced |= finite_value ? 0 : 1;
                bits[i] = finite_value ? bits[i] : 0;
            }
        }
        if constexpr (sizeof(E) == sizeof(T)) {
            __builtin_memcpy(block[r], bits, sizeof bits);
        } else {
            T values[panel];
            __builtin_memcpy(values, bits, sizeof bits);
#pragma omp simd
            for (int64_t i = 0; i < panel; ++i) block[r][i] = E(widen(values[i]));
        }
    }
    return replaced != 0;
}

#ifdef __AVX512F__
// to[j][i] = from[i][j] for 16 x 16 words of 4 bytes; the strides are in words. Words are exchanged first, then pairs of
// them, then quarters of the registers.
inline void transpose_words(void* to, int64_t to_stride, const void* from, int64_t from_stride) {
    __m512i rows[16], pairs[16], quads[16];
    for (int i = 0; i < 16; ++i) rows[i] = load<__m512i>(static_cast<const uint32_t*>(from) + i * from_stride);
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    uint32_t* out = static_cast<uint32_t*>(to);
    for (int i = 0; i < 4; ++i) {  // quarter q of quads[4 g + i] is column 4 q + i of rows 4 g to 4 g + 3
        const __m512i even_low = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0xdd);
        store(out + i * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        store(out + (4 + i) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        store(out + (8 + i) * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        store(out + (12 + i) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}
#endif

// to[j][i] = from[i][j] for 32 x `columns` words, columns a multiple of 16.
template <class C>
inline void transpose(C* to, int64_t to_stride, const C* from, int64_t from_stride, int64_t columns) {
#ifdef __AVX512F__
    if constexpr (sizeof(C) == 4) {
        for (int64_t i = 0; i < panel; i += 16)
            for (int64_t j = 0; j < columns; j += 16)
                transpose_words(to + j * to_stride + i, to_stride, from + i * from_stride + j, from_stride);
        return;
    }
#endif
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < panel; ++i) to[j * to_stride + i] = from[i * from_stride + j];
}

enum class Layout { rows, interleaved_rows, columns, interleaved_columns };

template <Layout layout, class E>
inline void write_block(E* to, const E (&block)[panel][panel]) {
    if constexpr (layout == Layout::rows || (layout == Layout::interleaved_rows && interleaved<E> == 1))
        __builtin_memcpy(to, block, sizeof block);
    else
        transpose(to, panel, &block[0][0], panel, panel);
}
#ifdef __AVX512BF16__
// Two of bfloat16 are a word.
template <Layout layout>
inline void write_block(bfloat16* to, const bfloat16 (&block)[panel][panel]) {
    alignas(64) uint16_t turn[2][panel];  // two vectors interleaved: the first 16 values of each, and the last
    alignas(64) uint16_t apart[2][panel];  // the even ones of two vectors' values, and the odd ones
    for (uint16_t i = 0; i < panel; ++i) {
        turn[0][i] = uint16_t(i / 2 + i % 2 * panel), turn[1][i] = uint16_t(turn[0][i] + panel / 2);
        apart[0][i] = uint16_t(2 * i), apart[1][i] = uint16_t(2 * i + 1);
    }
    const auto order = [](const uint16_t* from) { return load<__m512i>(from); };
    if constexpr (layout == Layout::rows) {
        __builtin_memcpy(to, block, sizeof block);
    } else if constexpr (layout == Layout::interleaved_rows) {
        for (int64_t i = 0; i < panel; i += 2) {
            const __m512i even = load<__m512i>(block[i]), odd = load<__m512i>(block[i + 1]);
            store(to + i * panel, _mm512_permutex2var_epi16(even, order(turn[0]), odd));
            store(to + (i + 1) * panel, _mm512_permutex2var_epi16(even, order(turn[1]), odd));
        }
    } else {
        alignas(64) uint32_t words[panel][panel / 2], columns[panel / 2][panel];
        __builtin_memcpy(words, block, sizeof words);
        transpose(&columns[0][0], panel, &words[0][0], panel / 2, panel / 2);
        if constexpr (layout == Layout::interleaved_columns) {
            __builtin_memcpy(to, columns, sizeof columns);
            return;
        }
        for (int64_t i = 0; i < panel / 2; ++i) {
            const __m512i low = load<__m512i>(columns[i]), high = load<__m512i>(columns[i] + 16);
            store(to + 2 * i * panel, _mm512_permutex2var_epi16(low, order(apart[0]), high));
            store(to + (2 * i + 1) * panel, _mm512_permutex2var_epi16(low, order(apart[1]), high));
        }
    }
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <Layout layout>
inline void write_block(bfloat16* to, const bfloat16 (&block)[panel][panel]) {
    if constexpr (layout == Layout::rows) {
        __builtin_memcpy(to, block, sizeof block);
    } else if constexpr (layout == Layout::interleaved_rows) {
        for (int64_t r = 0; r < panel; r += 2)
            for (int64_t i = 0; i < panel; ++i)
                for (int64_t j = 0; j < 2; ++j) to[r * panel + 2 * i + j] = block[r + j][i];
    } else if constexpr (layout == Layout::columns) {
        transpose(to, panel, &block[0][0], panel, panel);
    } else {  // two are a word
        uint32_t words[panel][panel / 2], columns[panel / 2][panel];
        __builtin_memcpy(words, block, sizeof words);
        transpose(&columns[0][0], panel, &words[0][0], panel / 2, panel / 2);
        __builtin_memcpy(to, columns, sizeof columns);
    }
}
#endif

// Packs `count` rows of x, from `row` on (both multiples of 32): as they are, or transposed (`columns`), for the left
// side of a product or interleaved for the right. `packed_rows` is the packed operand's number of rows. Returns whether
// `finite` replaced anything.
template <Layout layout, class E, class T>
inline bool pack(E* to, int64_t packed_rows, const Rows<T>& x, int64_t row, int64_t count, bool finite) {
    constexpr bool transposed = layout == Layout::columns || layout == Layout::interleaved_columns;
    bool replaced = false;
    for (int64_t r = row; r < row + count; r += panel)
        for (int64_t column = 0; column < x.columns; column += panel) {
            alignas(64) E block[panel][panel];
            replaced |= read_block(block, x, r, column, finite);
            write_block<layout>(
                to + (transposed ? packed(packed_rows, column, r) : packed(packed_rows, r, column)), block);
        }
    return replaced;
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
