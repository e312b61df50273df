// What attention's forward and backward pass share: contract and formulas in cogsym/ops/attention.py.
//
// Blocks of queries meet blocks of keys, as in FlashAttention-2 (arXiv 2307.08691), and only one block of logits exists
// at a time. Keys and values are packed once for all the query heads of their group and all blocks of queries.
#pragma once

#include "matrix.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace cogsym {
namespace COGSYM_ISA {

constexpr int64_t query_block = 64;
// A unit is one key-value head of one sequence. So many are packed at a time: enough for many threads, and bounded.
constexpr int64_t wave_units = 32;
// Below this many multiplications one thread does it all.
constexpr int64_t serial_products = 1 << 21;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out the scratch; without memory it only counts.
class Arena {
  public:
    explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
    template <class E>
    E* take(int64_t count) {
        char* place = memory_ ? memory_ + used_ : nullptr;
        used_ += round_up(count * int64_t(sizeof(E)), 64);
        return reinterpret_cast<E*>(place);
    }
    int64_t used() const { return used_; }

  private:
    char* memory_;
    int64_t used_ = 0;
};

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

inline int threads_for(const AttentionInputs& a) {
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

// The first key that query t of sequence b sees; it never decreases with t, and the last one is t.
inline int64_t first_key(const AttentionInputs& a, int64_t b, int64_t t) {
    int64_t first = a.starts ? a.starts[b * a.T + t] : 0;
    if (a.window && t - a.window + 1 > first) first = t - a.window + 1;
    return first < 0 ? 0 : smaller(first, t);
}

template <class C>
constexpr C infinity = C(__builtin_inf());

// e^x is 2^(x log2 e), of a difference of logits: it is small where e^x is not, and so is its rounding.
constexpr double log2_e = 1.4426950408889634;

}  // namespace COGSYM_ISA
}  // namespace cogsym
