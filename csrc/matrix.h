// Small matrix products on packed operands, compiled once for every instruction set.
//
// An operand is stored as panels of 32 columns, [columns / 32][rows][32], its dimensions padded with zeros to multiples
// of 32. In A · B the inner dimension is A's columns and B's rows. Instructions that multiply bfloat16 add the products
// of two neighbours of the inner dimension, so that B's rows are interleaved two by two: [columns / 32][rows / 2][32][2].
// One layout thus serves AMX (a tile is 16 lines of 64 contiguous bytes), AVX-512's vdpbf16ps and plain multiply-add.
#pragma once

#include "scalar.h"

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace cogsym {
namespace COGSYM_ISA {

constexpr int64_t panel = 32;

inline int64_t round_up(int64_t n, int64_t unit = panel) { return (n + unit - 1) / unit * unit; }

// What values of type T are multiplied as; the sums are of compute_t<T>.
template <class T>
struct operand {
    using type = compute_t<T>;
};
#ifdef __AVX512BF16__
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

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, vector_rows = 8;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, vector_rows = 4;
#else
constexpr int vector_bytes = 16, vector_rows = 4;
#endif

template <class C>
struct vector {
    typedef C type __attribute__((vector_size(vector_bytes)));
};
template <class C>
using vector_t = typename vector<C>::type;
template <class C>
constexpr int64_t lanes = vector_bytes / sizeof(C);

template <class V, class T>
inline V load(const T* from) {
    V x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

template <class V, class T>
inline void store(T* to, V x) {
    __builtin_memcpy(to, &x, sizeof x);
}

// sum + a b for one a and a vector of b.
template <class C>
inline vector_t<C> multiply_add(vector_t<C> sum, const C* a, const C* b) {
    return sum + *a * load<vector_t<C>>(b);
}
#ifdef __AVX512BF16__
inline vector_t<float> multiply_add(vector_t<float> sum, const bfloat16* a, const bfloat16* b) {
    const __m512i two = _mm512_set1_epi32(load<int>(a));
    return (vector_t<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)two, (__m512bh)load<__m512i>(b));
}
#endif

// c[M, N] = (add ? c : 0) + a[M, K] b[K, N]. c is an ordinary matrix whose rows are c_stride apart; a and b are packed,
// a_rows and b_rows the rows between their panels. M, N and K are multiples of 32.
template <class E, class C>
inline void multiply(C* c, int64_t c_stride, const E* a, int64_t a_rows, const E* b, int64_t b_rows, int64_t M,
                     int64_t N, int64_t K, bool add) {
    constexpr int64_t width = 2 * lanes<C>, step = interleaved<E>;
    for (int64_t n = 0; n < N; n += width) {
        const E* right = b + packed(b_rows, 0, n) + n % panel * step;
        for (int64_t m = 0; m < M; m += vector_rows) {
            vector_t<C> sums[vector_rows][2];
#pragma GCC unroll 8
            for (int r = 0; r < vector_rows; ++r)
                for (int i = 0; i < 2; ++i)
                    sums[r][i] =
                        add ? load<vector_t<C>>(c + (m + r) * c_stride + n + i * lanes<C>) : vector_t<C>{};
            for (int64_t k = 0; k < K; k += panel) {
                const E* left = a + packed(a_rows, m, k);
                const E* below = right + k * panel;
                for (int64_t i = 0; i < panel; i += step)
#pragma GCC unroll 8
                    for (int r = 0; r < vector_rows; ++r) {
                        sums[r][0] = multiply_add(sums[r][0], left + r * panel + i, below + i * panel);
                        sums[r][1] =
                            multiply_add(sums[r][1], left + r * panel + i, below + i * panel + lanes<C> * step);
                    }
            }
#pragma GCC unroll 8
            for (int r = 0; r < vector_rows; ++r)
                for (int i = 0; i < 2; ++i) store(c + (m + r) * c_stride + n + i * lanes<C>, sums[r][i]);
        }
    }
}

#ifdef __AMX_BF16__
// Tiles of 16 lines of 64 bytes: 0 to 3 hold 32 x 32 of c, 4 and 5 two of a, 6 and 7 two of b.
inline void multiply(float* c, int64_t c_stride, const bfloat16* a, int64_t a_rows, const bfloat16* b, int64_t b_rows,
                     int64_t M, int64_t N, int64_t K, bool add) {
    constexpr int64_t half = panel / 2, line = panel * sizeof(bfloat16);
    const int64_t c_line = c_stride * int64_t(sizeof(float));
    for (int64_t n = 0; n < N; n += panel)
        for (int64_t m = 0; m < M; m += panel) {
            float* corner = c + m * c_stride + n;
            if (add) {
                _tile_loadd(0, corner, c_line);
                _tile_loadd(1, corner + half, c_line);
                _tile_loadd(2, corner + half * c_stride, c_line);
                _tile_loadd(3, corner + half * c_stride + half, c_line);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < K; k += panel) {
                const bfloat16* left = a + packed(a_rows, m, k);
                const bfloat16* right = b + packed(b_rows, k, n);
                _tile_loadd(4, left, line);
                _tile_loadd(6, right, 2 * line);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right + panel, 2 * line);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, left + half * panel, line);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, corner, c_line);
            _tile_stored(1, corner + half, c_line);
            _tile_stored(2, corner + half * c_stride, c_line);
            _tile_stored(3, corner + half * c_stride + half, c_line);
        }
}
#endif

// While one lives, this thread may multiply. Tiles that stay configured would be saved at every change of context.
struct Multiplying {
#ifdef __AMX_BF16__
    Multiplying() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Multiplying() { _tile_release(); }
    Multiplying(const Multiplying&) = delete;
    Multiplying& operator=(const Multiplying&) = delete;
#else
    Multiplying() {}
    ~Multiplying() {}
#endif
};

template <class T>
inline bool is_finite(T x) {
    return widen(x) - widen(x) == 0;
}

// A strided matrix of a tensor's values.
template <class T>
struct Rows {
    const T* data;
    int64_t stride, rows, columns;
};

// 32 x 32 values as operands, with zeros beyond the matrix. Where an operand meets exact zeros (probabilities of keys
// that a query does not see), 0 · NaN must not spread: `finite` replaces what is not finite by 0.
template <class E, class T>
inline void read_block(E (&block)[panel][panel], const Rows<T>& x, int64_t row, int64_t column, bool finite) {
    const int64_t rows = x.rows - row < panel ? x.rows - row : panel;
    const int64_t columns = x.columns - column < panel ? x.columns - column : panel;
    for (int64_t r = 0; r < panel; ++r) {
        T values[panel] = {};
        if (r < rows)
            __builtin_memcpy(values, x.data + (row + r) * x.stride + column, std::size_t(columns) * sizeof(T));
        if (finite)
#pragma omp simd
            for (int64_t i = 0; i < panel; ++i) values[i] = is_finite(values[i]) ? values[i] : T{};
        if constexpr (sizeof(E) == sizeof(T))
            __builtin_memcpy(block[r], values, sizeof values);
        else
#pragma omp simd
            for (int64_t i = 0; i < panel; ++i) block[r][i] = E(widen(values[i]));
    }
}

enum class Layout { rows, interleaved_rows, columns, interleaved_columns };

// Packs `count` rows of x, from `row` on (both multiples of 32): as they are, or transposed (`columns`), for the left
// side of a product or interleaved for the right. `packed_rows` is the packed operand's number of rows.
template <Layout layout, class E, class T>
inline void pack(E* to, int64_t packed_rows, const Rows<T>& x, int64_t row, int64_t count, bool finite) {
    constexpr bool transposed = layout == Layout::columns || layout == Layout::interleaved_columns;
    constexpr bool pairs = layout == Layout::interleaved_rows || layout == Layout::interleaved_columns;
    constexpr int64_t step = pairs ? interleaved<E> : 1;
    for (int64_t r = row; r < row + count; r += panel)
        for (int64_t column = 0; column < x.columns; column += panel) {
            E block[panel][panel];
            read_block(block, x, r, column, finite);
            E* out = to + (transposed ? packed(packed_rows, column, r) : packed(packed_rows, r, column));
            for (int64_t i = 0; i < panel; i += step)
                for (int64_t j = 0; j < panel; ++j)
                    for (int64_t s = 0; s < step; ++s)
                        out[i * panel + j * step + s] = transposed ? block[j][i + s] : block[i + s][j];
        }
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
