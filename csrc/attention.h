// What attention's forward and backward pass share: contract and formulas in cogsym/ops/attention.py.
//
// Blocks of queries meet blocks of keys, as in FlashAttention-2 (arXiv 2307.08691), and only one block of logits exists
// at a time. Keys and values are packed once for all the query heads of their group and all blocks of queries.
#pragma once

#include "matrix.h"
#include "scratch.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace cogsym {
namespace COGSYM_ISA {

constexpr int64_t query_block = 64;
// A unit is one key-value head of one sequence. Units packed at a time: enough for many threads, few enough to bound the memory they take.
constexpr int64_t wave_units = 32;
// Below this many multiplications one thread does it all.
constexpr int64_t serial_products = 1 << 21;

// What both directions take. A last dimension is contiguous; strides are those of the others. Nothing is copied for
// grouped heads.
struct Attention {
    const void* q;  // [B, T, H, D]
    int64_t q_strides[3];
    const void* k;  // [B, T, KV, D]
    int64_t k_strides[3];
    const void* v;  // [B, T, KV, D]
    int64_t v_strides[3];
    const int32_t* starts;  // [B, T] contiguous, non-decreasing: the first key that each query sees, or null: 0
    int64_t B, T, H, KV, D;
    double scale;
    int64_t window;   // 0 is none
    double soft_cap;  // 0 is none
    DType dtype;
    int num_threads;
    Scratch scratch;
    void* o;    // [B, T, H, D] contiguous
    void* lse;  // [B, H, T] contiguous, of the compute type
    // Forward
    const void* sinks;  // [H] of the compute type, or null: none
    // Backward
    const void* dout;  // [B, T, H, D]
    int64_t dout_strides[3];
    void *dq, *dk, *dv;  // as q, k and v, contiguous; each null where it is not wanted
};

#define COGSYM_ATTENTION_FIELDS                                                                                    \
    COGSYM_FIELD(Attention, q), COGSYM_FIELD(Attention, q_strides), COGSYM_FIELD(Attention, k),                   \
        COGSYM_FIELD(Attention, k_strides), COGSYM_FIELD(Attention, v), COGSYM_FIELD(Attention, v_strides),       \
        COGSYM_FIELD(Attention, starts), COGSYM_FIELD(Attention, B), COGSYM_FIELD(Attention, T),                  \
        COGSYM_FIELD(Attention, H), COGSYM_FIELD(Attention, KV), COGSYM_FIELD(Attention, D),                      \
        COGSYM_FIELD(Attention, scale), COGSYM_FIELD(Attention, window), COGSYM_FIELD(Attention, soft_cap),       \
        COGSYM_FIELD(Attention, dtype), COGSYM_FIELD(Attention, num_threads), COGSYM_FIELD(Attention, scratch),   \
        COGSYM_FIELD(Attention, o), COGSYM_FIELD(Attention, lse)

// f(task, thread), in any order: no two tasks write to the same place, so the result does not depend on it.
template <class F>
inline void for_tasks(int64_t count, int num_threads, F f) {
    if (num_threads == 1) {
        const Multiplying multiplying;
        for (int64_t i = 0; i < count; ++i) f(i, 0);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads)
    {
        const Multiplying multiplying;
        const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) f(i, thread);
    }
#endif
}

inline int threads_for(const Attention& a) {
#ifdef _OPENMP
    return a.B * a.H * a.T * a.T * a.D < serial_products ? 1 : a.num_threads;
#else
    (void)a;
    return 1;
#endif
}

template <class T>
inline Rows<T> head_rows(const void* x, const int64_t (&strides)[3], int64_t b, int64_t head, int64_t row, int64_t end,
                         int64_t D) {
    return {static_cast<const T*>(x) + b * strides[0] + row * strides[1] + head * strides[2], strides[1], end - row, D};
}

// Whether each query sees itself, and no query keys that one before it did not.
inline bool starts_fit(const Attention& a) {
    if (!a.starts) return true;
    bool fit = true;
    for (int64_t b = 0; b < a.B; ++b) {
        const int32_t* starts = a.starts + b * a.T;
        for (int64_t t = 0; t < a.T; ++t) fit &= starts[t] <= t && starts[t] >= (t ? starts[t - 1] : 0);
    }
    return fit;
}

// The first key that query t of sequence b sees; it never decreases with t, and the last one is t.
inline int64_t first_key(const Attention& a, int64_t b, int64_t t) {
    int64_t first = a.starts ? a.starts[b * a.T + t] : 0;
    if (a.window && t - a.window + 1 > first) first = t - a.window + 1;
    return first;
}

template <class T, class C = compute_t<T>>
C dot(const T* x, const T* y, int64_t n) {
    C parts[panel] = {};
    int64_t i = 0;
    for (; i + panel <= n; i += panel)
#pragma omp simd
        for (int64_t j = 0; j < panel; ++j) parts[j] += widen(x[i + j]) * widen(y[i + j]);
    for (int64_t j = 0; i + j < n; ++j) parts[j] += widen(x[i + j]) * widen(y[i + j]);
    vector_t<C> sum = {};
    for (int64_t j = 0; j < panel; j += lanes<C>) sum += load<vector_t<C>>(parts + j);
    return sum_of<C>(sum);
}

template <class C>
constexpr C infinity = C(__builtin_inf());

// e^x is 2^(x log2 e), of a difference of logits: it is small where e^x is not, and so is its rounding.
constexpr double log2_e = 1.4426950408889634;

// Where logits are products times a positive scale, the largest is kept as the product that it is, and the scale goes into
// the exponent. Where not, it is kept as the logit: in units of 1.
template <class A>
inline bool in_products(const A& a) {
    return a.soft_cap == 0 && a.scale > 0;
}
template <class A>
inline double unit_of(const A& a) {
    return in_products(a) ? a.scale : 1.0;
}

// A query's sink, the logit of a key whose value is 0, into its softmax so far: sums of values, Σ e^(logit - top), and
// the largest logit. Returns what the sums are multiplied by, and lse.
template <class C>
struct Sunk {
    C factor, lse;
};
template <class C>
inline Sunk<C> with_sink(C top, C total, C sink) {
    const C largest = sink > top ? sink : top;
    const C share = C(__builtin_exp(top - largest)), sum = total * share + C(__builtin_exp(sink - largest));
    return {share / sum, C(largest + __builtin_log(sum))};
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
