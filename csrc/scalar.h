// Element types and the scalar functions that the compiler vectorises, compiled once for every instruction set.
//
// Arithmetic is float for float32, bfloat16 and float16, and double for float64; a result is rounded once, to nearest
// even. NaN and infinity behave as IEEE 754 says: nothing here is compiled with -ffast-math.
#pragma once

#include <cstddef>
#include <cstdint>

#include "declare.h"

#if defined(__AVX512BF16__) || defined(__F16C__)
#include <immintrin.h>
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

namespace cogsym {
namespace COGSYM_ISA {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class T>
struct compute {
    using type = float;
};
template <>
struct compute<double> {
    using type = double;
};
template <class T>
using compute_t = typename compute<T>::type;

inline uint32_t to_bits(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, sizeof u);
    return u;
}

inline float from_bits(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, sizeof x);
    return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float widen(float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    // The product moves the exponent's bias from 15 to 127 and makes subnormal numbers normal.
    const float finite = from_bits(magnitude << 13) * 0x1p112f;
    const uint32_t special = 0x7f800000u | (magnitude << 13);
    return from_bits(sign | (magnitude >= 0x7c00 ? special : to_bits(finite)));
}

template <class T>
inline T narrow(compute_t<T> x) {
    return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
    const uint32_t u = to_bits(x);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (u >> 16) | 0x40;
    return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded)};
}
template <>
inline float16 narrow<float16>(float x) {
    const uint32_t u = to_bits(x), magnitude = u & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 2^-1 leaves a subnormal result, rounded by the addition, in the low bits.
    const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return {uint16_t(((u >> 16) & 0x8000) | (magnitude >= (143u << 23) ? special : finite))};
}

// e^x for x <= 0, to within 2 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial in r (Cephes expf). Below the
// smallest normal number it is 0.
inline float exponential(float x) {
    const float shift = 0x1.8p23f;  // its addition rounds to an integer, which then lies in the low bits
    const float shifted = x * 1.44269504f + shift;
    const float n = shifted - shift;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    const float power = from_bits((to_bits(shifted) + 127) << 23);
    return x < -87.0f ? 0.0f : p * power;  // a NaN stays one
}
inline double exponential(double x) { return __builtin_exp(x); }

// A product as it is rounded: a multiply-add takes the 0, and not what is added later.
template <class V>
inline V rounded(V product) {
    return product + V{};
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// out[i] = f(i), rounded to T.
template <class T>
struct Write {
    template <class F>
    static inline void run(T* out, int64_t n, F f) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(f(i));
    }
};

// Conversions that are an instruction take blocks of a constant size; the tail goes through the same instruction, so
// that a value does not depend on its place in the row.
template <class T, class Convert, class F>
inline void write_blocks(T* out, int64_t n, F f, Convert convert) {
    constexpr int64_t block = 32;
    alignas(64) float buffer[block];
    int64_t i = 0;
    for (; i + block <= n; i += block) {
#pragma omp simd
        for (int64_t j = 0; j < block; ++j) buffer[j] = f(i + j);
        convert(out + i, buffer);
    }
    if (i < n) {
        T tail[block];
#pragma omp simd
        for (int64_t j = 0; j < n - i; ++j) buffer[j] = f(i + j);
        for (int64_t j = n - i; j < block; ++j) buffer[j] = 0;
        convert(tail, buffer);
        __builtin_memcpy(out + i, tail, std::size_t(n - i) * sizeof(T));
    }
}

#ifdef __AVX512BF16__
template <>
struct Write<bfloat16> {
    template <class F>
    static inline void run(bfloat16* out, int64_t n, F f) {
        write_blocks(out, n, f, [](bfloat16* to, const float* from) {
            const __m512bh packed = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
            __builtin_memcpy(to, &packed, sizeof packed);
        });
    }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct Write<bfloat16> {
    template <class F>
    static inline void run(bfloat16* out, int64_t n, F f) {
        write_blocks(out, n, f, [](bfloat16* to, const float* from) {
            for (int j = 0; j < 32; j += 8) {
                const bfloat16x8_t low = vcvtq_low_bf16_f32(vld1q_f32(from + j));
                const bfloat16x8_t packed = vcvtq_high_bf16_f32(low, vld1q_f32(from + j + 4));
                __builtin_memcpy(to + j, &packed, sizeof packed);
            }
        });
    }
};
#endif

#ifdef __F16C__
template <>
struct Write<float16> {
    template <class F>
    static inline void run(float16* out, int64_t n, F f) {
        write_blocks(out, n, f, [](float16* to, const float* from) {
            for (int j = 0; j < 32; j += 8) {
                const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT);
                __builtin_memcpy(to + j, &packed, sizeof packed);
            }
        });
    }
};
#endif

template <class T, class F>
inline void write(T* out, int64_t n, F f) {
    Write<T>::run(out, n, f);
}

// f of a value of the element type that `dtype` names.
template <class F>
inline auto with_type(DType dtype, F f) {
    switch (dtype) {
        case DType::float32: return f(float{});
        case DType::bfloat16: return f(bfloat16{});
        case DType::float16: return f(float16{});
        case DType::float64: return f(double{});
    }
    __builtin_unreachable();
}

// out[i] = add + scale * table[i], whatever the table's element type.
template <class C>
inline void widen_table(C* out, const void* table, DType dtype, int64_t n, C scale, C add) {
    with_type(dtype, [&](auto element) {
        const auto* from = static_cast<const decltype(element)*>(table);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = add + scale * C(widen(from[i]));
    });
}

// Below this many elements one thread does it all. Two threads that are awake break even at 8,000 to 16,000; PyTorch,
// whose pool this is, asks for 32,768 a thread.
constexpr int64_t serial_elements = 32768;

// f(i) for i in [0, count), over num_threads threads where `elements` in all are worth it. The team always has the
// size that the caller passes: PyTorch's OpenMP pool would otherwise shrink and grow at every change.
template <class F>
inline void parallel_for(int64_t count, int64_t elements, int num_threads, F f) {
    if (num_threads == 1 || elements < serial_elements) {
        for (int64_t i = 0; i < count; ++i) f(i);
        return;
    }
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t i = 0; i < count; ++i) f(i);
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
