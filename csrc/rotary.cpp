// Rotary position embedding: contract and formula in cogsym/ops/rotary.py.

#include "scalar.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

// Turns n pairs of one head: (a[0], b[0]), (a[stride], b[stride]), ...
template <int stride, class T, class C>
void turn(T* ya, T* yb, const T* a, const T* b, const C* cos, const C* sin, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const C ai = widen(a[i * stride]), bi = widen(b[i * stride]);
        ya[i * stride] = narrow<T>(ai * cos[i] - bi * sin[i]);
        yb[i * stride] = narrow<T>(bi * cos[i] + ai * sin[i]);
    }
}

template <class T>
void rotate(const Rotary& a) {
    using C = compute_t<T>;
    constexpr int64_t tile = 256;  // pairs whose cos and sin are widened once for all heads
    parallel_for(a.B * a.T, a.B * a.T * a.H * a.D, a.num_threads, [&](int64_t token) {
        const int64_t b = token / a.T, t = token % a.T;
        const T* x = static_cast<const T*>(a.x) + b * a.x_strides[0] + t * a.x_strides[1];
        T* y = static_cast<T*>(a.y) + token * a.H * a.D;
        const int64_t cos_begin = b * a.cos_strides[0] + t * a.cos_strides[1];
        const int64_t sin_begin = b * a.sin_strides[0] + t * a.sin_strides[1];
        for (int64_t begin = 0; begin < a.half; begin += tile) {
            const int64_t n = a.half - begin < tile ? a.half - begin : tile;
            C cos[tile], sin[tile];
            with_type(a.table_dtype, [&](auto element) {
                using E = decltype(element);
                const E* c = static_cast<const E*>(a.cos) + cos_begin + begin;
                const E* s = static_cast<const E*>(a.sin) + sin_begin + begin;
                const C sign = a.inverse ? C(-1) : C(1);
#pragma omp simd
                for (int64_t i = 0; i < n; ++i) {
                    cos[i] = C(widen(c[i]));
                    sin[i] = sign * C(widen(s[i]));
                }
            });
            for (int64_t head = 0; head < a.H; ++head) {
                const T* from = x + head * a.x_strides[2];
                T* to = y + head * a.D;
                if (a.interleaved) {
                    from += 2 * begin, to += 2 * begin;
                    turn<2>(to, to + 1, from, from + 1, cos, sin, n);
                } else {
                    from += begin, to += begin;
                    turn<1>(to, to + a.half, from, from + a.half, cos, sin, n);
                }
            }
        }
        const int64_t turned = 2 * a.half;
        if (turned < a.D)
            for (int64_t head = 0; head < a.H; ++head)
                __builtin_memcpy(y + head * a.D + turned, x + head * a.x_strides[2] + turned,
                                 std::size_t(a.D - turned) * sizeof(T));
    });
}

}  // namespace

void rotary(const Rotary& a) {
    with_type(a.dtype, [&](auto element) { rotate<decltype(element)>(a); });
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
