// Small matrix products on packed operands, compiled once for every instruction set.
//
// The operands lie in memory as packing.h describes.
#pragma once

#include "packing.h"

namespace cogsym {
namespace COGSYM_ISA {

// How many rows of c a product works on at a time: with two vectors each, they fill the registers.
constexpr int vector_rows = vector_bytes == 64 ? 8 : 4;

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
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline vector_t<float> multiply_add(vector_t<float> sum, const bfloat16* a, const bfloat16* b) {
    const auto two = vreinterpretq_bf16_u32(vdupq_n_u32(load<uint32_t>(a)));
    return (vector_t<float>)vbfdotq_f32((float32x4_t)sum, two, load<bfloat16x8_t>(b));
}
#endif

// How many products are added up one by one; operands of two bytes are rounded far more than their sums.
template <class E>
constexpr int64_t longest_chain = sizeof(E) == 2 ? 1 << 20 : 4 * panel;

// c[M, N] = (add ? c : 0) + a[M, K] b[K, N]. c is an ordinary matrix whose rows are c_stride apart; a and b are packed,
// a_rows and b_rows the rows between their panels. M, N and K are multiples of 32.
template <class E, class C>
inline void multiply(C* c, int64_t c_stride, const E* a, int64_t a_rows, const E* b, int64_t b_rows, int64_t M,
                     int64_t N, int64_t K, bool add) {
    constexpr int64_t width = 2 * lanes<C>, step = interleaved<E>;
    for (int64_t n = 0; n < N; n += width) {
        const E* right = b + packed(b_rows, 0, n) + n % panel * step;
        for (int64_t m = 0; m < M; m += vector_rows)
            for (int64_t begin = 0, end; begin < K; begin = end) {
                end = K - begin > longest_chain<E> ? begin + longest_chain<E> : K;
                vector_t<C> sums[vector_rows][2];
#pragma GCC unroll 8
                for (int r = 0; r < vector_rows; ++r)
                    for (int i = 0; i < 2; ++i) sums[r][i] = vector_t<C>{};
                for (int64_t k = begin; k < end; k += panel) {
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
                    for (int i = 0; i < 2; ++i) {
                        // Added last: the error of a sum of sums is smaller than that of one long chain.
                        C* out = c + (m + r) * c_stride + n + i * lanes<C>;
                        store(out, add || begin ? load<vector_t<C>>(out) + sums[r][i] : sums[r][i]);
                    }
            }
    }
}

#ifdef __AMX_BF16__
// Tiles of 16 lines of 64 bytes: 0 to 3 hold 32 x 32 of c, 4 and 5 two of a, 6 and 7 two of b.
inline void multiply(float* c, int64_t c_stride, const bfloat16* a, int64_t a_rows, const bfloat16* b, int64_t b_rows,
                     int64_t M, int64_t N, int64_t K, bool add) {
    constexpr int64_t half = panel / 2, line = panel * sizeof(bfloat16);
    const int64_t c_line = c_stride * int64_t(sizeof(float));
    // GCC's intrinsics do not say that a tile is loaded from memory: what was written must be there.
    __asm__ volatile("" ::: "memory");
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

// Values as a left operand: one row's.
template <class C>
inline void store_operand(C* to, vector_t<C> x) {
    store(to, x);
}
// A whole panel's.
template <class C, class V, std::size_t N>
inline void store_panel(C* to, const V (&x)[N]) {
    __builtin_memcpy(to, x, sizeof x);
}
// Values of two rows as a right operand whose rows are interleaved.
template <class C>
inline void store_operands(C*, vector_t<C>, vector_t<C>) {}
#ifdef __AVX512BF16__
inline void store_operand(bfloat16* to, floats x) { store(to, _mm512_cvtneps_pbh((__m512)x)); }
inline void store_panel(bfloat16* to, const floats (&x)[2]) {
    store(to, _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
}
inline void store_operands(bfloat16* to, floats even, floats odd) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    constexpr auto place = [](int i) { return short(i / 2 + i % 2 * 16); };
    const __m512i order = _mm512_set_epi16(
        place(31), place(30), place(29), place(28), place(27), place(26), place(25), place(24), place(23), place(22),
        place(21), place(20), place(19), place(18), place(17), place(16), place(15), place(14), place(13), place(12),
        place(11), place(10), place(9), place(8), place(7), place(6), place(5), place(4), place(3), place(2), place(1),
        place(0));
    store(to, _mm512_permutexvar_epi16(order, both));
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline void store_operand(bfloat16* to, floats x) { store(to, vcvt_bf16_f32((float32x4_t)x)); }
inline void store_panel(bfloat16* to, const floats (&x)[panel / lanes<float>]) {
    for (int64_t i = 0; i < panel / lanes<float>; ++i) store_operand(to + i * lanes<float>, x[i]);
}
inline void store_operands(bfloat16* to, floats even, floats odd) {
    const bfloat16x4_t low = vcvt_bf16_f32((float32x4_t)even), high = vcvt_bf16_f32((float32x4_t)odd);
    const uint16x4_t pairs[2] = {vzip1_u16(vreinterpret_u16_bf16(low), vreinterpret_u16_bf16(high)),
                                 vzip2_u16(vreinterpret_u16_bf16(low), vreinterpret_u16_bf16(high))};
    __builtin_memcpy(to, pairs, sizeof pairs);
}
#endif

// Configures AMX tiles for this thread while it lives. Left configured, they would be saved at every context switch.
struct Multiplying {
#ifdef __AMX_BF16__
    Multiplying() {
        struct Config {
            uint8_t palette, start_row, reserved[14];
            uint16_t line_bytes[16];
            uint8_t lines[16];
        };
        static const Config config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
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

}  // namespace COGSYM_ISA
}  // namespace cogsym
