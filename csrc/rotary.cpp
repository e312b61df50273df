// Rotary position embedding: contract and formula in cogsym/ops/rotary.py.

#include "scalar.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

struct Rotary {
    const void* x;  // [B, T, H, D]
    int64_t x_strides[3];
    const void* cos;  // [B or 1, T, half]; a batch stride of 0 shares it
    int64_t cos_strides[2];
    const void* sin;
    int64_t sin_strides[2];
    void* y;  // [B, T, H, D] contiguous
    int64_t B, T, H, D, half;
    bool interleaved, inverse;
    DType dtype, table_dtype;
    int num_threads;
};

// Turns the pairs (a[0], b[0]), (a[1], b[1]), ... of one head.
template <class T, class C>
void turn_halves(T* ya, T* yb, const T* a, const T* b, const C* cos, const C* sin, int64_t n) {
    write(ya, n, [=](int64_t i) { return widen(a[i]) * cos[i] - widen(b[i]) * sin[i]; });
    write(yb, n, [=](int64_t i) { return widen(b[i]) * cos[i] + widen(a[i]) * sin[i]; });
}

// Turns the pairs (x[0], x[1]), (x[2], x[3]), ... of one head.
template <class T, class C>
void turn_neighbours(T* y, const T* x, const C* cos, const C* sin, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const C a = widen(x[2 * i]), b = widen(x[2 * i + 1]);
        y[2 * i] = narrow<T>(a * cos[i] - b * sin[i]);
        y[2 * i + 1] = narrow<T>(b * cos[i] + a * sin[i]);
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
                if (a.interleaved)
                    turn_neighbours(to + 2 * begin, from + 2 * begin, cos, sin, n);
                else
                    turn_halves(to + begin, to + begin + a.half, from + begin, from + begin + a.half, cos, sin, n);
            }
        }
        const int64_t turned = 2 * a.half;
        if (turned < a.D)
            for (int64_t head = 0; head < a.H; ++head)
                __builtin_memcpy(y + head * a.D + turned, x + head * a.x_strides[2] + turned,
                                 std::size_t(a.D - turned) * sizeof(T));
    });
}

void rotary(const Rotary& a) {
    with_type(a.dtype, [&](auto element) { rotate<decltype(element)>(a); });
}

#define FIELD(name) COGSYM_FIELD(Rotary, name)
constexpr Field fields[] = {
    FIELD(x), FIELD(x_strides), FIELD(cos), FIELD(cos_strides), FIELD(sin), FIELD(sin_strides), FIELD(y), FIELD(B),
    FIELD(T), FIELD(H), FIELD(D), FIELD(half), FIELD(interleaved), FIELD(inverse), FIELD(dtype), FIELD(table_dtype),
    FIELD(num_threads)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(rotary) = {kernel<rotary>("rotary", "y, x turned.", fields), {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
