// What attention of single rows is made of: which of them share keys, and the products of a chunk of keys.
//
// Neighbouring rows whose ranges are alike make a run, for which keys and values are read once; the query heads of a
// group always do. A vector holds queries, so a key's logits are one vector however few queries there are, and maxima
// and sums need no step across a vector. Keys are multiplied where they lie in the store.

#pragma once

#include "attention.h"

namespace cogsym {
namespace COGSYM_ISA {

// Keys whose logits exist at a time: they, the packed values and the keys fit the caches near a core.
constexpr int64_t chunk_keys = 128;
// Keys and values are asked for so many keys before they are used: no prefetcher follows the rows of one head.
constexpr int64_t fetched_keys = 64;
// Queries that share keys, unless a single row has more.
constexpr int64_t block_queries = 64;
// Where there are fewer rows than this, their keys are divided until there are about this many tasks, none smaller than
// `least_cost`. The number does not follow the threads, so that the result does not either.
constexpr int64_t wanted_tasks = 32;
constexpr int64_t least_cost = 4 * chunk_keys;
// Below this cost times KV · D one thread does it all.
constexpr int64_t serial_cost = 1 << 17;

// A last dimension is contiguous; strides are those of the others.
struct DecodeAttention {
    const void* q;  // [N, H, D]
    int64_t q_strides[2];
    const void* k;  // [S, KV, D]
    int64_t k_strides[2];
    const void* v;  // [S, KV, D]
    int64_t v_strides[2];
    const int64_t* begins;  // [N, M] contiguous
    const int64_t* ends;    // [N, M] contiguous
    const void* sinks;      // [H] of the compute type, or null: none
    int64_t N, M, S, H, KV, D;
    double scale, soft_cap;  // a soft cap of 0 is none
    DType dtype;
    int num_threads;
    Scratch scratch;
    void* o;  // [N, H, D] contiguous
};

// Rows [first, last) and the keys that any of them sees in its range m.
struct Run {
    int64_t first, last, m, begin, end;
};

inline Run range_of(const DecodeAttention& a, int64_t n, int64_t m) {
    return {n, n + 1, m, a.begins[n * a.M + m], a.ends[n * a.M + m]};
}

inline Run joined(const Run& x, const Run& y) {
    return {x.first, y.last, x.m, smaller(x.begin, y.begin), larger(x.end, y.end)};
}

// Reading a panel of keys costs about as much as its products with a vector of queries, few or many.
template <class C>
inline int64_t cost(const DecodeAttention& a, const Run& run) {
    const int64_t queries = (run.last - run.first) * (a.H / a.KV);
    return round_up(run.end - run.begin) * (1 + (queries + lanes<C> - 1) / lanes<C>);
}

// Whether y, the row behind the run x, is better computed with it: they share keys, and enough of them.
template <class C>
inline bool join(const DecodeAttention& a, const Run& x, const Run& y) {
    const bool share = larger(x.begin, y.begin) < smaller(x.end, y.end);
    return share && cost<C>(a, joined(x, y)) < cost<C>(a, x) + cost<C>(a, y);
}

template <class T>
inline void prefetch(const T* row, int64_t D) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t d = 0; d < D; d += line) __builtin_prefetch(row + d);
}

// f(run) for the rows of a block, range by range.
template <class C, class F>
inline void for_ranges(const DecodeAttention& a, int64_t first, int64_t last, F f) {
    for (int64_t m = 0; m < a.M; ++m)
        for (int64_t n = first; n < last;) {
            Run run = range_of(a, n, m);
            while (run.last < last && join<C>(a, run, range_of(a, run.last, m)))
                run = joined(run, range_of(a, run.last, m));
            if (run.begin < run.end) f(run);
            n = run.last;
        }
}

// f(first, last, cost, chunks) for blocks of rows that have something in common.
template <class C, class F>
inline void for_blocks(const DecodeAttention& a, F f) {
    const int64_t most_rows = larger(block_queries / (a.H / a.KV), 1);
    const auto alike = [&](int64_t n) {
        for (int64_t m = 0; m < a.M; ++m)
            if (join<C>(a, range_of(a, n - 1, m), range_of(a, n, m))) return true;
        return false;
    };
    for (int64_t first = 0, last; first < a.N; first = last) {
        for (last = first + 1; last < a.N && last - first < most_rows && alike(last);) ++last;
        int64_t total = 0, chunks = 0;
        for_ranges<C>(a, first, last, [&](const Run& run) {
            total += cost<C>(a, run);
            chunks += (run.end - run.begin + chunk_keys - 1) / chunk_keys;
        });
        f(first, last, total, chunks);
    }
}

// Some of the chunks of a block of rows: a task for each key-value head.
struct Part {
    int64_t first, last, first_chunk, last_chunk;
    int64_t index, count;  // among the parts of its block
    int64_t state;         // where its result waits for the others', if there are any
};

// A block's result so far, by query: row of the block · G + head of the group.
template <class C>
struct State {
    C* sums;         // o before its division, [queries, D]
    C *top, *total;  // largest logit, `unit_of` for its unit, and Σ e^(logit - top)
};

template <class E, class C>
struct DecodeThread {
    E* rows;           // [32, D]
    E* queries;        // a right operand, [D / 2 or D][columns][2 or 1]: read a vector at any column
    E* keys;           // a panel of them, where they cannot be read in the store
    E* values;         // packed [chunk_keys, D], rows interleaved, zeros behind the last
    C* logits;         // [vectors of queries][chunk_keys][lanes]
    E* probabilities;  // bfloat16: [lanes][chunk_keys]. Else they lie where the logits lay
    C* product;        // [lanes, D]
    State<C> state;
};

// A panel of keys as a left operand: element (row, d) is at row · row_stride + d / 32 · panel_stride + d % 32.
template <class E>
struct Keys {
    const E* data;
    int64_t row_stride, panel_stride;
};

// to[key][lane] = key · query for 32 keys and `vectors` vectors of queries, whose results are to_stride apart.
template <class E, class C>
inline void multiply_keys(C* to, int64_t to_stride, const Keys<E>& keys, const E* queries, int64_t columns,
                          int64_t vectors, int64_t D) {
    constexpr int64_t step = interleaved<E>;
    constexpr int rows = 8;
    for (int64_t i = 0; i < vectors; ++i)
        for (int64_t key = 0; key < panel; key += rows) {
            vector_t<C> sums[rows] = {};
            for (int64_t d = 0; d < D; d += panel) {
                const E* left = keys.data + key * keys.row_stride + d / panel * keys.panel_stride;
                const E* right = queries + d * columns + i * lanes<C> * step;
                for (int64_t j = 0; j < panel; j += step)
#pragma GCC unroll 8
                    for (int r = 0; r < rows; ++r)
                        sums[r] = multiply_add(sums[r], left + r * keys.row_stride + j, right + j * columns);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) store(to + i * to_stride + (key + r) * lanes<C>, sums[r]);
        }
}

// Where the probability of (query, key) lies.
template <class E, class C>
inline int64_t probability_at(int64_t query, int64_t key) {
    return interleaved<E> == 2 ? query * chunk_keys + key : key * lanes<C> + query;
}

// to[queries, D] = p · values over `width` keys, a multiple of 32, for at least `queries` of a vector's.
template <int rows, class E, class C>
inline void multiply_value_rows(C* to, const E* p, const E* values, int64_t query, int64_t width, int64_t D) {
    constexpr int64_t step = interleaved<E>, columns = 2 * lanes<C>;
    for (int64_t d = 0; d < D; d += columns) {
        const E* right = values + packed(chunk_keys, 0, d) + d % panel * step;
        vector_t<C> sums[rows][2] = {};
        for (int64_t key = 0; key < width; key += step)
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const E* left = p + probability_at<E, C>(query + r, key);
                sums[r][0] = multiply_add(sums[r][0], left, right + key * panel);
                sums[r][1] = multiply_add(sums[r][1], left, right + key * panel + lanes<C> * step);
            }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < 2; ++i) store(to + (query + r) * D + d + i * lanes<C>, sums[r][i]);
    }
}
template <class E, class C>
inline void multiply_values(C* to, const E* p, const E* values, int64_t queries, int64_t width, int64_t D) {
    constexpr int few = lanes<C> < 4 ? int(lanes<C>) : 4;
    for (int64_t query = 0; query < queries;) {
        if (vector_rows > few && queries - query > few && lanes<C> >= vector_rows) {
            multiply_value_rows<vector_rows>(to, p, values, query, width, D);
            query += vector_rows;
        } else {
            multiply_value_rows<few>(to, p, values, query, width, D);
            query += few;
        }
    }
}

#ifdef __AMX_BF16__
// Tiles 0 to 3 hold 32 keys x 32 queries, 4 and 5 keys, 6 and 7 queries.
inline void multiply_keys(float* to, int64_t to_stride, const Keys<bfloat16>& keys, const bfloat16* queries,
                          int64_t columns, int64_t vectors, int64_t D) {
    constexpr int64_t half = panel / 2;
    const int64_t key_line = keys.row_stride * int64_t(sizeof(bfloat16)), query_line = columns * int64_t(sizeof(int));
    __asm__ volatile("" ::: "memory");
    for (int64_t i = 0; i < vectors; i += 2) {
        const bool both = i + 1 < vectors;
        _tile_zero(0);
        _tile_zero(2);
        if (both) {
            _tile_zero(1);
            _tile_zero(3);
        }
        for (int64_t d = 0; d < D; d += panel) {
            const bfloat16* left = keys.data + d / panel * keys.panel_stride;
            const bfloat16* right = queries + d * columns + i * panel;
            _tile_loadd(4, left, key_line);
            _tile_loadd(6, right, query_line);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, left + half * keys.row_stride, key_line);
            _tile_dpbf16ps(2, 5, 6);
            if (both) {
                _tile_loadd(7, right + panel, query_line);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        constexpr int64_t line = half * int64_t(sizeof(float));
        float* first = to + i * to_stride;
        _tile_stored(0, first, line);
        _tile_stored(2, first + half * half, line);
        if (both) {
            _tile_stored(1, first + to_stride, line);
            _tile_stored(3, first + to_stride + half * half, line);
        }
    }
    __asm__ volatile("" ::: "memory");
}

// Tiles 0 to 3 hold 16 queries x 64 values, 4 probabilities, 6 and 7 values.
inline void multiply_values(float* to, const bfloat16* p, const bfloat16* values, int64_t, int64_t width, int64_t D) {
    constexpr int64_t half = panel / 2, line = panel * sizeof(bfloat16), p_line = chunk_keys * sizeof(bfloat16);
    const int64_t to_line = D * int64_t(sizeof(float));
    __asm__ volatile("" ::: "memory");
    for (int64_t d = 0; d < D; d += 2 * panel) {
        const bool both = d + panel < D;
        _tile_zero(0);
        _tile_zero(1);
        if (both) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t key = 0; key < width; key += panel) {
            const bfloat16* right = values + packed(chunk_keys, key, d);
            _tile_loadd(4, p + key, p_line);
            _tile_loadd(6, right, 2 * line);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, right + panel, 2 * line);
            _tile_dpbf16ps(1, 4, 7);
            if (both) {
                _tile_loadd(6, right + chunk_keys * panel, 2 * line);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(7, right + chunk_keys * panel + panel, 2 * line);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
        _tile_stored(0, to + d, to_line);
        _tile_stored(1, to + d + half, to_line);
        if (both) {
            _tile_stored(2, to + d + panel, to_line);
            _tile_stored(3, to + d + panel + half, to_line);
        }
    }
    __asm__ volatile("" ::: "memory");
}
#endif

// 2^((x - shift) exponent) of `width` keys as a left operand, zeros up to a multiple of 32; adds them to `total`.
template <class E, class C>
inline void exponentials(E* to, const C* x, int64_t width, C exponent, vector_t<C> shift, vector_t<C>& total) {
    using V = vector_t<C>;
    constexpr int64_t step = lanes<C>;
    V sums[2] = {total, V{}};
    const auto probability = [&](int64_t key) {
        if (key >= width) return V{};
        const V p = exponential2((load<V>(x + key * step) - shift) * exponent);
        sums[key % 2] += p;
        return p;
    };
#ifdef __AVX512BF16__
    if constexpr (interleaved<E> == 2)
        for (int64_t key = 0; key < width; key += panel) {
            alignas(64) E pairs[panel / 2][panel];
            for (int64_t i = 0; i < panel; i += 2) {
                const V even = probability(key + i);
                store_operands(pairs[i / 2], even, probability(key + i + 1));
            }
            transpose_words(to + key, chunk_keys / 2, pairs, panel / 2);
        }
#else
    if constexpr (interleaved<E> == 2)
        for (int64_t key = 0; key < round_up(width); ++key) {
            const V p = probability(key);
            for (int64_t query = 0; query < step; ++query) to[query * chunk_keys + key] = narrow<E>(p[query]);
        }
#endif
    if constexpr (interleaved<E> == 1)
        for (int64_t key = 0; key < round_up(width); ++key) store(to + key * step, probability(key));
    total = sums[0] + sums[1];
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
