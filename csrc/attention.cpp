// Attention: contract and formulas in cogsym/ops/attention.py. Blocks of queries meet blocks of keys, as in
// FlashAttention-2 (arXiv 2307.08691), and only one block of logits exists at a time.
//
// Keys and values are packed once for all the query heads of their group and all blocks of queries. In the forward pass
// a row of logits belongs to a query: the softmax needs its maximum. In the backward pass the log-sum-exp is known, a
// row belongs to a key, and pᵀ and dsᵀ come out as dv = pᵀ do and dk = dsᵀ q read them; dq is summed as dqᵀ = kᵀ dsᵀ.

#include "matrix.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace cogsym {
namespace COGSYM_ISA {
namespace {

constexpr int64_t query_block = 64, forward_keys = 256, backward_keys = 128;
// Rows a power of two apart would meet in the same few lines of the cache.
constexpr int64_t logits_stride = forward_keys + 16;
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
void for_tasks(int64_t count, int num_threads, F f) {
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

int threads_for(const AttentionInputs& a) {
#ifdef _OPENMP
    return a.B * a.H * a.T * a.T * a.D < serial_products ? 1 : a.num_threads;
#else
    (void)a;
    return 1;
#endif
}

template <class T>
Rows<T> head_rows(const void* x, const int64_t (&strides)[3], int64_t b, int64_t head, int64_t row, int64_t end,
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

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

// Logits, in units of ln 2: exponentials are powers of 2 then, and the product with log2 e is free.
template <class C>
struct Logits {
    explicit Logits(const AttentionInputs& a)
        : capped(a.soft_cap != 0),
          scale(capped ? C(a.scale / a.soft_cap) : C(a.scale * log2_e)),
          cap(C(a.soft_cap * log2_e)) {}
    bool capped;
    C scale, cap;
};

// --- forward ---

template <class C>
struct ForwardThread {
    void* query;          // packed [query_block, D]
    C* logits;            // [query_block, forward_keys], rows logits_stride apart
    C* sums;              // o before its division, [query_block, D]
    void* probabilities;  // packed [query_block, forward_keys]
    C *top, *total;       // of each row: the largest logit, and Σ 2^(logit - top), a vector of parts
};

// Logits of the queries' rows to probabilities, unnormalised, and the rows' sums brought to the new maximum.
template <class E, class C>
void softmax_block(const AttentionInputs& a, const ForwardThread<C>& at, int64_t b, int64_t query, int64_t rows,
                   int64_t key, int64_t width, int64_t padded_D) {
    using V = vector_t<C>;
    constexpr int64_t step = lanes<C>, stride = query_block * panel;
    const Logits<C> logits(a);
    const V place = counting<C>(), none = V{} - infinity<C>;
    for (int64_t r = 0; r < rows; ++r) {
        C* x = at.logits + r * logits_stride;
        const int64_t first = larger(first_key(a, b, query + r) - key, 0), last = query + r - key;
        // Panels in which this query sees a key; the others are zeros.
        const int64_t begin = smaller(first / panel * panel, width);
        const int64_t end = larger(smaller(round_up(last + 1), width), begin);
        const bool plain = !logits.capped && first <= begin && last >= end - 1;
        V tops[2] = {V{} + at.top[r], V{} + at.top[r]};
        for (int64_t i = begin; i < end; i += 2 * step)
            for (int64_t n = 0; n < 2; ++n) {
                const int64_t j = i + n * step;
                V y = load<V>(x + j) * logits.scale;
                if (!plain) {
                    if (logits.capped) y = hyperbolic_tangent(y) * logits.cap;
                    if (j < first || j + step - 1 > last) {
                        y = place < C(first - j) ? none : y;
                        y = place > C(last - j) ? none : y;
                    }
                    store(x + j, y);
                }
                tops[n] = y > tops[n] ? y : tops[n];
            }
        const C top = largest<C>(tops[0] > tops[1] ? tops[0] : tops[1], at.top[r]);
        const C scale = plain ? logits.scale : C(1);
        // No finite logit yet: the difference below must stay -inf, and a NaN a NaN.
        const C shift = top == -infinity<C> ? C(0) : top;
        E* to = static_cast<E*>(at.probabilities) + r * panel;
        for (int64_t i = 0; i < begin; i += panel) __builtin_memset(to + i / panel * stride, 0, panel * sizeof(E));
        for (int64_t i = end; i < width; i += panel) __builtin_memset(to + i / panel * stride, 0, panel * sizeof(E));
        V sums[2] = {load<V>(at.total + r * step), V{}};
        if (top != at.top[r] && at.top[r] != -infinity<C>) {
            const C shrink = exponential2(V{} + (at.top[r] - top))[0];
            sums[0] *= shrink;
            C* o = at.sums + r * padded_D;
            for (int64_t i = 0; i < padded_D; i += step) store(o + i, load<V>(o + i) * shrink);
        }
        at.top[r] = top;
        for (int64_t i = begin; i < end; i += panel) {
            V p[panel / step];
            for (int64_t j = 0; j < panel / step; ++j) {
                p[j] = exponential2(load<V>(x + i + j * step) * scale - shift);
                sums[j % 2] += p[j];
            }
            store_panel(to + i / panel * stride, p);
        }
        store(at.total + r * step, sums[0] + sums[1]);
    }
}

template <class T>
int64_t forward(const Attention& a) {
    using C = compute_t<T>;
    using E = operand_t<T>;
    const int64_t G = a.H / a.KV, D = round_up(a.D), length = round_up(a.T), blocks = (a.T + query_block - 1) / query_block;
    const int64_t units = a.B * a.KV, wave = smaller(units, wave_units);
    const int threads = threads_for(a);

    Arena arena(a.scratch);
    E* keys = arena.take<E>(wave * length * D);    // transposed, interleaved
    E* values = arena.take<E>(wave * length * D);  // interleaved, what is not finite replaced by 0
    bool* tainted = arena.take<bool>(wave * length / panel);
    ForwardThread<C>* scratch = arena.take<ForwardThread<C>>(threads);
    for (int i = 0; i < threads; ++i) {
        const ForwardThread<C> at = {arena.take<E>(query_block * D),
                                     arena.take<C>(query_block * logits_stride),
                                     arena.take<C>(query_block * D),
                                     arena.take<E>(query_block * forward_keys),
                                     arena.take<C>(query_block),
                                     arena.take<C>(query_block * lanes<C>)};
        if (a.scratch) scratch[i] = at;
    }
    if (!a.scratch) return arena.used();

    const auto block = [&](int64_t unit, int64_t place, int64_t query, int64_t g, const ForwardThread<C>& at) {
        const int64_t b = unit / a.KV, kv = unit % a.KV, head = kv * G + g;
        const int64_t end = smaller(query + query_block, a.T), rows = end - query, padded = round_up(rows);
        E* packed_query = static_cast<E*>(at.query);
        pack<Layout::rows>(packed_query, query_block, head_rows<T>(a.q, a.q_strides, b, head, query, end, a.D), 0,
                           padded, false);
        for (int64_t r = 0; r < rows; ++r) {
            at.top[r] = -infinity<C>;
            store(at.total + r * lanes<C>, vector_t<C>{});
        }
        const int64_t begin = first_key(a, b, query) / panel * panel;
        const int64_t last_key = query + padded;
        for (int64_t key = begin; key < last_key; key += forward_keys) {
            const int64_t width = smaller(last_key - key, forward_keys);
            multiply(at.logits, logits_stride, packed_query, query_block,
                     keys + place * length * D + packed(D, 0, key), D, padded, width, D, false);
            softmax_block<E>(a, at, b, query, rows, key, width, D);
            multiply(at.sums, D, static_cast<const E*>(at.probabilities), query_block,
                     values + place * length * D + packed(length, key, 0), length, padded, D, width, key != begin);
        }
        bool spoilt = false;
        for (int64_t key = begin; key < end; key += panel) spoilt |= tainted[(place * length + key) / panel];
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t t = query + r;
            C* sums = at.sums + r * D;
            if (spoilt) {
                const Rows<T> v = head_rows<T>(a.v, a.v_strides, b, kv, 0, t + 1, a.D);
                for (int64_t s = first_key(a, b, t); s <= t; ++s)
                    for (int64_t d = 0; d < a.D; ++d)
                        if (const T x = v.data[s * v.stride + d]; !is_finite(x)) sums[d] += widen(x);
            }
            const C total = sum_of<C>(load<vector_t<C>>(at.total + r * lanes<C>)), inverse = C(1) / total;
            write(static_cast<T*>(a.o) + ((b * a.T + t) * a.H + head) * a.D, a.D,
                  [=](int64_t d) { return sums[d] * inverse; });
            static_cast<C*>(a.lse)[(b * a.H + head) * a.T + t] = at.top[r] * C(ln_2) + C(__builtin_log(total));
        }
    };

    for (int64_t first = 0; first < units; first += wave) {
        const int64_t count = smaller(units - first, wave), panels = length / panel;
        for_tasks(count * panels, threads, [&](int64_t task, int) {
            const int64_t place = task / panels, key = task % panels * panel, unit = first + place;
            const Rows<T> k = head_rows<T>(a.k, a.k_strides, unit / a.KV, unit % a.KV, 0, a.T, a.D);
            const Rows<T> v = head_rows<T>(a.v, a.v_strides, unit / a.KV, unit % a.KV, 0, a.T, a.D);
            pack<Layout::interleaved_columns>(keys + place * length * D, D, k, key, panel, false);
            tainted[task] = pack<Layout::interleaved_rows>(values + place * length * D, length, v, key, panel, true);
        });
        // The last blocks of queries see most keys: first, so that no thread ends with a large one.
        for_tasks(count * blocks * G, threads, [&](int64_t task, int thread) {
            const int64_t place = task / (blocks * G), i = blocks - 1 - task / G % blocks;
            block(first + place, place, i * query_block, task % G, scratch[thread]);
        });
    }
    return 0;
}

// --- backward ---

template <class C>
struct BackwardThread {
    void *query_columns, *dout_columns;  // qᵀ and doᵀ, packed [D, query_block], interleaved
    void *query_rows, *dout_rows;        // packed [query_block, D], interleaved
    C *logits, *dlogits;                 // [backward_keys, query_block]: sᵀ, then pᵀ; dpᵀ, then dsᵀ
    void *probabilities, *left, *right;  // packed: pᵀ; dsᵀ for the left side of a product, and for the right
    C *dquery, *dquery_rows;             // dqᵀ, [D, query_block], and dq
    C *lse, *delta;                      // of each query: its log-sum-exp / ln 2, and Σ do o
    C* first;                            // of each query: the first key it sees
};

// pᵀ = 2^(sᵀ - lse) and dsᵀ = pᵀ (dpᵀ - delta), for the rows of keys from `key` on, two at a time.
template <class E, class C>
void gradient_block(const AttentionInputs& a, const BackwardThread<C>& at, int64_t query, int64_t padded, int64_t key,
                    int64_t width, bool whole) {
    using V = vector_t<C>;
    E *probabilities = static_cast<E*>(at.probabilities), *left = static_cast<E*>(at.left);
    E* right = static_cast<E*>(at.right);
    const Logits<C> logits(a);
    for (int64_t i = 0; i < padded; i += lanes<C>) {
        const V lse = load<V>(at.lse + i), delta = load<V>(at.delta + i), first = load<V>(at.first + i);
        const V place = counting<C>() + C(query + i);
        // No query of this panel sees a key behind its last one.
        const int64_t end = whole ? width : smaller(round_up(query + i + lanes<C> - key, 2), width);
        const int64_t row = i / panel * backward_keys * panel + i % panel;
        for (int64_t r = 0; r < end; r += 2) {
            V p[2], ds[2];
            for (int n = 0; n < 2; ++n) {
                const V x = load<V>(at.logits + (r + n) * query_block + i) * logits.scale;
                const V dp = load<V>(at.dlogits + (r + n) * query_block + i);
                if (logits.capped) {
                    const V t = hyperbolic_tangent(x);
                    p[n] = exponential2(t * logits.cap - lse);
                    ds[n] = p[n] * (dp - delta) * (C(1) - t * t);
                } else {
                    p[n] = exponential2(x - lse);
                    ds[n] = p[n] * (dp - delta);
                }
                if (!whole) {
                    const C s = C(key + r + n);
                    p[n] = place < s ? V{} : s < first ? V{} : p[n];
                    ds[n] = place < s ? V{} : s < first ? V{} : ds[n];
                }
                store_operand(probabilities + row + (r + n) * panel, p[n]);
                store_operand(left + row + (r + n) * panel, ds[n]);
            }
            store_operands(right + packed(backward_keys, r, i / panel * panel) + i % panel * 2, ds[0], ds[1]);
        }
        for (int64_t r = end; r < width; ++r) {
            store_operand(probabilities + row + r * panel, V{});
            store_operand(left + row + r * panel, V{});
            if (r % 2 == 0) store_operands(right + packed(backward_keys, r, i / panel * panel) + i % panel * 2, V{}, V{});
        }
    }
}

// Blocks of queries are cut into so many chunks, each with sums of dk and dv of its own: enough tasks for the threads
// where units are few. It depends on the shape alone, and so does the result.
inline int64_t chunks_of(const AttentionInputs& a) {
    constexpr int64_t tasks = 16, rows = 512;
    const int64_t wanted = (tasks + a.B * a.KV - 1) / (a.B * a.KV);
    return larger(smaller(wanted, a.T * (a.H / a.KV) / rows), 1);
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

template <class T>
int64_t backward(const AttentionBackward& a) {
    using C = compute_t<T>;
    using E = operand_t<T>;
    const int64_t G = a.H / a.KV, D = round_up(a.D), length = round_up(a.T), blocks = (a.T + query_block - 1) / query_block;
    const int64_t units = a.B * a.KV, wave = smaller(units, wave_units), chunks = chunks_of(a);
    const int threads = threads_for(a);

    Arena arena(a.scratch);
    E* keys = arena.take<E>(wave * length * D);         // by rows
    E* values = arena.take<E>(wave * length * D);       // by rows
    E* key_columns = arena.take<E>(wave * length * D);  // transposed, what is not finite replaced by 0
    C* dkeys = arena.take<C>(wave * chunks * length * D);
    C* dvalues = arena.take<C>(wave * chunks * length * D);
    BackwardThread<C>* scratch = arena.take<BackwardThread<C>>(threads);
    for (int i = 0; i < threads; ++i) {
        constexpr int64_t area = query_block * backward_keys;
        const BackwardThread<C> at = {
            arena.take<E>(query_block * D), arena.take<E>(query_block * D), arena.take<E>(query_block * D),
            arena.take<E>(query_block * D), arena.take<C>(area),            arena.take<C>(area),
            arena.take<E>(area),            arena.take<E>(area),            arena.take<E>(area),
            arena.take<C>(query_block * D), arena.take<C>(query_block * D), arena.take<C>(query_block), arena.take<C>(query_block),
            arena.take<C>(query_block)};
        if (a.scratch) scratch[i] = at;
    }
    if (!a.scratch) return arena.used();

    const auto block = [&](int64_t unit, int64_t place, int64_t query, int64_t g, C* dkey, C* dvalue,
                           const BackwardThread<C>& at) {
        const int64_t b = unit / a.KV, head = unit % a.KV * G + g;
        const int64_t end = smaller(query + query_block, a.T), padded = round_up(end - query);
        const Rows<T> q = head_rows<T>(a.q, a.q_strides, b, head, query, end, a.D);
        const Rows<T> dout = head_rows<T>(a.dout, a.dout_strides, b, head, query, end, a.D);
        E *query_columns = static_cast<E*>(at.query_columns), *dout_columns = static_cast<E*>(at.dout_columns);
        E *query_rows = static_cast<E*>(at.query_rows), *dout_rows = static_cast<E*>(at.dout_rows);
        pack<Layout::interleaved_columns>(query_columns, D, q, 0, padded, false);
        pack<Layout::interleaved_columns>(dout_columns, D, dout, 0, padded, false);
        pack<Layout::interleaved_rows>(query_rows, query_block, q, 0, padded, true);
        pack<Layout::interleaved_rows>(dout_rows, query_block, dout, 0, padded, true);
        for (int64_t i = 0; i < padded; ++i) {
            if (query + i >= a.T) {  // no query: p = e^-inf
                at.lse[i] = infinity<C>, at.delta[i] = 0, at.first[i] = 0;
                continue;
            }
            const T* o = static_cast<const T*>(a.o) + ((b * a.T + query + i) * a.H + head) * a.D;
            const T* grad = dout.data + i * dout.stride;
            const C delta = dot(o, grad, a.D);
            // A gradient that is not finite was packed as 0: it spreads to the keys seen through p.
            const bool finite = delta - delta == 0;
            const C lse = static_cast<const C*>(a.lse)[(b * a.H + head) * a.T + query + i];
            at.lse[i] = finite ? lse * C(log2_e) : C(__builtin_nan(""));
            at.delta[i] = delta, at.first[i] = C(first_key(a, b, query + i));
        }
        const int64_t begin = first_key(a, b, query) / panel * panel, last_key = query + padded;
        for (int64_t key = begin; key < last_key; key += backward_keys) {
            const int64_t width = smaller(last_key - key, backward_keys), base = place * length * D;
            const bool whole = key + width - 1 <= query && first_key(a, b, end - 1) <= key;
            multiply(at.logits, query_block, keys + base + packed(length, key, 0), length, query_columns, D, width,
                     padded, D, false);
            multiply(at.dlogits, query_block, values + base + packed(length, key, 0), length, dout_columns, D, width,
                     padded, D, false);
            gradient_block<E>(a, at, query, padded, key, width, whole);
            const E* left = static_cast<const E*>(at.left);
            const E* right = interleaved<E> == 2 ? static_cast<const E*>(at.right) : left;
            if (a.dv)
                multiply(dvalue + key * D, D, static_cast<const E*>(at.probabilities), backward_keys, dout_rows,
                         query_block, width, D, padded, true);
            if (a.dk)
                multiply(dkey + key * D, D, left, backward_keys, query_rows, query_block, width, D, padded, true);
            if (a.dq)
                multiply(at.dquery, query_block, key_columns + base + packed(D, 0, key), D, right, backward_keys, D,
                         padded, width, key != begin);
        }
        if (!a.dq) return;
        const C scale = C(a.scale);
        for (int64_t d = 0; d < D; d += panel)
            transpose(at.dquery_rows + d, D, at.dquery + d * query_block, query_block, padded);
        for (int64_t i = 0; i < end - query; ++i) {
            const C* row = at.dquery_rows + i * D;
            write(static_cast<T*>(a.dq) + ((b * a.T + query + i) * a.H + head) * a.D, a.D,
                  [=](int64_t d) { return row[d] * scale; });
        }
    };

    const int64_t panels = length / panel;
    for (int64_t first = 0; first < units; first += wave) {
        const int64_t count = smaller(units - first, wave);
        for_tasks(count * panels, threads, [&](int64_t task, int) {
            const int64_t place = task / panels, key = task % panels * panel, unit = first + place;
            const Rows<T> k = head_rows<T>(a.k, a.k_strides, unit / a.KV, unit % a.KV, 0, a.T, a.D);
            const Rows<T> v = head_rows<T>(a.v, a.v_strides, unit / a.KV, unit % a.KV, 0, a.T, a.D);
            pack<Layout::rows>(keys + place * length * D, length, k, key, panel, false);
            pack<Layout::rows>(values + place * length * D, length, v, key, panel, false);
            if (a.dq) pack<Layout::columns>(key_columns + place * length * D, D, k, key, panel, true);
        });
        for_tasks(count * chunks, threads, [&](int64_t task, int thread) {
            const int64_t chunk = chunks - 1 - task / count, place = task % count, at = place * chunks + chunk;
            C *dkey = dkeys + at * length * D, *dvalue = dvalues + at * length * D;
            __builtin_memset(dkey, 0, std::size_t(length * D) * sizeof(C));
            __builtin_memset(dvalue, 0, std::size_t(length * D) * sizeof(C));
            for (int64_t i = blocks * chunk / chunks; i < blocks * (chunk + 1) / chunks; ++i)
                for (int64_t g = 0; g < G; ++g)
                    block(first + place, place, i * query_block, g, dkey, dvalue, scratch[thread]);
        });
        for_tasks(count * panels, threads, [&](int64_t task, int) {
            const int64_t place = task / panels, key = task % panels * panel, unit = first + place;
            const auto sum = [&](void* to, C* parts, C scale) {
                for (int64_t s = key; s < smaller(key + panel, a.T); ++s) {
                    C* total = parts + (place * chunks * length + s) * D;
                    for (int64_t chunk = 1; chunk < chunks; ++chunk)
#pragma omp simd
                        for (int64_t d = 0; d < D; ++d) total[d] += total[chunk * length * D + d];
                    write(static_cast<T*>(to) + ((unit / a.KV * a.T + s) * a.KV + unit % a.KV) * a.D, a.D,
                          [=](int64_t d) { return total[d] * scale; });
                }
            };
            if (a.dk) sum(a.dk, dkeys, C(a.scale));
            if (a.dv) sum(a.dv, dvalues, C(1));
        });
    }
    return 0;
}

}  // namespace

int64_t attention(const Attention& a) {
    int64_t bytes = 0;
    with_type(a.dtype, [&](auto element) { bytes = forward<decltype(element)>(a); });
    return bytes;
}

int64_t attention_backward(const AttentionBackward& a) {
    int64_t bytes = 0;
    with_type(a.dtype, [&](auto element) { bytes = backward<decltype(element)>(a); });
    return bytes;
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
