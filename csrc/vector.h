// Vectors of the instruction set's width, for loops that the compiler would not vectorise well by itself: those with
// sums and maxima in registers. GCC's and clang's vector extension; intrinsics only for what it cannot express.
#pragma once

#include "scalar.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace cogsym {
namespace COGSYM_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class C>
struct vector {
    typedef C type __attribute__((vector_size(vector_bytes)));
};
template <>
struct vector<bfloat16> {};  // there is none, and an overload that names it is no candidate
template <class C>
using vector_t = typename vector<C>::type;
template <class C>
constexpr int64_t lanes = vector_bytes / sizeof(C);

using floats = vector_t<float>;
using doubles = vector_t<double>;

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

// 0, 1, 2, ...
template <class C>
inline vector_t<C> counting() {
    vector_t<C> x;
    for (int64_t i = 0; i < lanes<C>; ++i) x[i] = C(i);
    return x;
}

// The largest of x, none of which is NaN, and of `start`.
template <class C>
inline C largest(vector_t<C> x, C start) {
#ifdef __AVX512F__
    if constexpr (sizeof(C) == 4) {
        const float top = _mm512_reduce_max_ps((__m512)x);
        return top > start ? top : start;
    }
#endif
    for (int64_t i = 0; i < lanes<C>; ++i) start = x[i] > start ? x[i] : start;
    return start;
}

template <class C>
inline C sum_of(vector_t<C> x) {
#ifdef __AVX512F__
    if constexpr (sizeof(C) == 4) return _mm512_reduce_add_ps((__m512)x);
#endif
    C sum = 0;
    for (int64_t i = 0; i < lanes<C>; ++i) sum += x[i];
    return sum;
}

// 2^x to within 2 ulp: x = n + r with n = floor(x), and a polynomial in r (minimax with 2^0 = 1, relative error 8e-8).
// Below the smallest normal number it is 0; 2^-inf is 0, and a NaN stays one.
inline floats exponential2(floats x) {
#ifdef __AVX512F__
    const floats r = (floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const float shift = 0x1.8p23f;  // its addition rounds to an integer, which then lies in the low bits
    const floats shifted = (x - 0.5f) + shift, r = x - (shifted - shift);
#endif
    floats p = r * 1.8671300495043397e-3f + 9.017030708491802e-3f;
    p = p * r + 5.579991266131401e-2f;
    p = p * r + 2.4016444385051727e-1f;
    p = p * r + 6.931512951850891e-1f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    // p 2^floor(x). Making a number below the smallest normal one takes as long as a hundred others.
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (floats)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
#else
    using ints = vector_t<int32_t>;
    const floats power = (floats)(((ints)shifted + 127) << 23);
    return x < -126.0f ? floats{} : p * power;
#endif
}
inline doubles exponential2(doubles x) {
    for (int64_t i = 0; i < lanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
    return x;
}

// e^x for x <= 0 as `exponential` of scalar.h has it. Where 2^(x log2 e) would be taken of an x that is not small, the
// product's rounding alone is more than an ulp of the result.
inline floats exponential(floats x) {
#ifdef __AVX512F__
    const floats n = (floats)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const float shift = 0x1.8p23f;
    const floats shifted = x * 1.44269504f + shift, n = shifted - shift;
#endif
    const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
#ifdef __AVX512F__
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    return (floats)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    using ints = vector_t<int32_t>;
    const floats power = (floats)(((ints)shifted + 127) << 23);
    return x < -87.0f ? floats{} : p * power;
#endif
}
inline doubles exponential(doubles x) {
    for (int64_t i = 0; i < lanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
}

inline floats hyperbolic_tangent(floats x) {
    const floats magnitude = x < 0.0f ? -x : x, square = x * x;
    // 1 - e^-2x would cancel near 0 (Cephes tanhf).
    floats p = square * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const floats small = p * square * x + x;
    // 1 - 2 e^-2x / (1 + e^-2x): what is rounded on the way matters less, the nearer the result is to 1.
    const floats power = exponential2(magnitude * -2.88539008f), large = 1.0f - (power + power) / (1.0f + power);
    return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}
inline doubles hyperbolic_tangent(doubles x) {
    for (int64_t i = 0; i < lanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
