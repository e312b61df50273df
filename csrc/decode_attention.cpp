// Attention of single rows over ranges of a flat store: contract and formula in cogsym/ops/decode_attention.py.
//
// Neighbouring rows whose ranges are alike make a run, for which keys and values are read once; the query heads of a
// group always do. A vector holds queries, so a key's logits are one vector however few queries there are, and maxima
// and sums need no step across a vector. Keys are multiplied where they lie in the store.

#include "attention.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

// Keys whose logits exist at a time: they, the packed values and the keys fit the caches near a core.
constexpr int64_t chunk_keys = 128;
// Queries that share keys, unless a single row has more.
constexpr int64_t block_queries = 64;
// Work is cut into about so many tasks where rows alone are not enough of them, whatever the number of threads: the
// result shall not depend on it. None is smaller than `least_cost`.
constexpr int64_t wanted_tasks = 32;
constexpr int64_t least_cost = 4 * chunk_keys;
// Below this cost times KV · D one thread does it all.
constexpr int64_t serial_cost = 1 << 17;

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

// Whether y, the row behind the run x, is better computed with it.
template <class C>
inline bool join(const DecodeAttention& a, const Run& x, const Run& y) {
    return x.begin < x.end && y.begin < y.end && cost<C>(a, joined(x, y)) < cost<C>(a, x) + cost<C>(a, y);
}

// f(run) for the rows of a block, range by range.
template <class C, class F>
inline void for_runs(const DecodeAttention& a, int64_t first, int64_t last, F f) {
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
        for_runs<C>(a, first, last, [&](const Run& run) {
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
    C *top, *total;  // largest logit, and Σ e^(logit - top)
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

// e^(x - shift) of `width` keys as a left operand, zeros up to a multiple of 32; adds them to `total`.
template <class E, class C>
inline void exponentials(E* to, const C* x, int64_t width, C scale, vector_t<C> shift, vector_t<C>& total) {
    using V = vector_t<C>;
    constexpr int64_t step = lanes<C>;
    V sums[2] = {total, V{}};
    const auto probability = [&](int64_t key) {
        if (key >= width) return V{};
        const V p = exponential2((load<V>(x + key * step) * scale - shift) * C(log2_e));
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
#endif
    if constexpr (interleaved<E> == 1)
        for (int64_t key = 0; key < round_up(width); ++key) store(to + key * step, probability(key));
    total = sums[0] + sums[1];
}

// What a packed operand is moved as: two interleaved values are a word.
template <class E>
struct word {
    using type = E;
};
template <>
struct word<bfloat16> {
    using type = uint32_t;
};

template <class T>
struct Decode {
    using C = compute_t<T>;
    using E = operand_t<T>;
    using V = vector_t<C>;
    using Thread = DecodeThread<E, C>;
    static constexpr int64_t width = lanes<C>;

    const DecodeAttention& a;
    int64_t G, D, columns;

    explicit Decode(const DecodeAttention& arguments)
        : a(arguments),
          G(a.H / a.KV),
          D(round_up(a.D)),
          columns(round_up(smaller(larger(block_queries, G), a.N * G) + width)) {}

    State<C> take_state(Arena& arena) const {
        C* sums = arena.take<C>(columns * D);
        C* top = arena.take<C>(columns);
        return {sums, top, arena.take<C>(columns)};
    }

    Thread take_thread(Arena& arena) const {
        Thread at;
        at.rows = arena.take<E>(panel * D);
        at.queries = arena.take<E>(columns * D);
        at.keys = arena.take<E>(panel * D);
        at.values = arena.take<E>(chunk_keys * D);
        at.logits = arena.take<C>(chunk_keys * columns);
        at.probabilities = arena.take<E>(interleaved<E> == 2 ? chunk_keys * width : 0);
        at.product = arena.take<C>(width * D);
        at.state = take_state(arena);
        return at;
    }

    Rows<T> rows_of(const void* x, const int64_t (&strides)[2], int64_t kv, int64_t begin, int64_t end) const {
        return {static_cast<const T*>(x) + begin * strides[0] + kv * strides[1], strides[0], end - begin, a.D};
    }

    // The queries of a block as a right operand, with zeros in the columns behind them.
    void pack_queries(const Part& part, int64_t kv, const Thread& at) const {
        using Word = typename word<E>::type;
        constexpr int64_t step = interleaved<E>;
        const int64_t count = (part.last - part.first) * G;
        for (int64_t query = 0; query < count + width; query += panel) {
            const int64_t here = larger(smaller(count - query, panel), 0);
            for (int64_t i = 0; i < here; ++i) {
                const int64_t n = part.first + (query + i) / G, head = kv * G + (query + i) % G;
                const T* from = static_cast<const T*>(a.q) + n * a.q_strides[0] + head * a.q_strides[1];
                E* to = at.rows + i * D;
                if constexpr (sizeof(E) == sizeof(T))
                    __builtin_memcpy(to, from, std::size_t(a.D) * sizeof(T));
                else
                    for (int64_t d = 0; d < a.D; ++d) to[d] = E(widen(from[d]));
                if (a.D < D) __builtin_memset(to + a.D, 0, std::size_t(D - a.D) * sizeof(E));
            }
            __builtin_memset(at.rows + here * D, 0, std::size_t((panel - here) * D) * sizeof(E));
            transpose(reinterpret_cast<Word*>(at.queries) + query, columns, reinterpret_cast<const Word*>(at.rows),
                      D / step, D / step);
        }
    }

    // Logits to probabilities for the vector of queries from `query` on, `count` of them in use. Returns what the sums
    // so far shrink by, now that the largest logit may be larger.
    V softmax(const Thread& at, C* x, E* p, int64_t query, int64_t count, int64_t keys, const C (*seen)[width]) const {
        const bool capped = a.soft_cap != 0;
        const C factor = C(capped ? a.scale / a.soft_cap : a.scale), cap = C(a.soft_cap);
        const V none = V{} - infinity<C>;
        // Where the logits are only scaled, by a positive number, their maximum is scaled too, and the product is free.
        const bool scaled = !capped && factor > 0;
        if (!scaled)
            for (int64_t key = 0; key < keys; ++key) {
                const V y = load<V>(x + key * width) * factor;
                store(x + key * width, capped ? hyperbolic_tangent(y) * cap : y);
            }
        if (seen) {
            const V first = load<V>(seen[0]), last = load<V>(seen[1]);
            for (int64_t key = 0; key < keys; ++key) {
                const V y = load<V>(x + key * width), place = V{} + C(key);
                store(x + key * width, place < first ? none : place < last ? y : none);
            }
        }
        V tops[4] = {none, none, none, none};
        int64_t key = 0;
        for (; key + 4 <= keys; key += 4)
            for (int i = 0; i < 4; ++i) {
                const V y = load<V>(x + (key + i) * width);
                tops[i] = y > tops[i] ? y : tops[i];
            }
        for (; key < keys; ++key) {
            const V y = load<V>(x + key * width);
            tops[0] = y > tops[0] ? y : tops[0];
        }
        for (int i = 1; i < 4; ++i) tops[0] = tops[i] > tops[0] ? tops[i] : tops[0];

        const C scale = scaled ? factor : C(1);
        const V before = load<V>(at.state.top + query), total_before = load<V>(at.state.total + query);
        const V top = tops[0] * scale > before ? tops[0] * scale : before;
        // No finite logit yet: the difference below must stay -inf, and a NaN a NaN.
        const V shift = top == none ? V{} : top;
        const V shrink = before == none ? V{} : exponential2((before - shift) * C(log2_e));
        V total = total_before * shrink;
        exponentials(p, x, keys, scale, shift, total);
        // The rest of the vector are queries of other rows.
        const V place = counting<C>(), in_use = V{} + C(count);
        store(at.state.top + query, place < in_use ? top : before);
        store(at.state.total + query, place < in_use ? total : total_before);
        return shrink;
    }

    // The keys [begin, end) of a run, at most chunk_keys, into the state of the block whose first row is `row`.
    void chunk(const Run& run, int64_t begin, int64_t end, int64_t row, int64_t kv, const Thread& at) const {
        const int64_t keys = end - begin, padded = round_up(keys), queries = (run.last - run.first) * G;
        const int64_t first_query = (run.first - row) * G, vectors = (queries + width - 1) / width;
        bool mixed = false;  // whether there are keys that not all of these rows see
        for (int64_t n = run.first; n < run.last; ++n) {
            const Run own = range_of(a, n, run.m);
            mixed |= own.begin > begin || own.end < end;
        }
        const bool spoilt = pack<Layout::interleaved_rows>(at.values, chunk_keys,
                                                           rows_of(a.v, a.v_strides, kv, begin, end), 0, padded, mixed);
        if (spoilt && mixed) {  // 0 · NaN: each row meets the values that it sees, and no other
            for (int64_t n = run.first; n < run.last; ++n) {
                const Run own = range_of(a, n, run.m);
                const int64_t from = larger(own.begin, begin), to = smaller(own.end, end);
                if (from < to) chunk(own, from, to, row, kv, at);
            }
            return;
        }
        const Rows<T> k = rows_of(a.k, a.k_strides, kv, begin, end);
        for (int64_t key = 0; key < padded; key += panel) {
            const T* from = k.data + key * k.stride;
            Keys<E> left = {at.keys, panel, panel * panel};
            if (sizeof(T) == sizeof(E) && a.D % panel == 0 && key + panel <= keys)
                left = {reinterpret_cast<const E*>(from), k.stride, panel};
            else
                pack<Layout::rows>(at.keys, panel, Rows<T>{from, k.stride, keys - key, a.D}, 0, panel, false);
            multiply_keys(at.logits + key * width, chunk_keys * width, left,
                          static_cast<const E*>(at.queries) + first_query * interleaved<E>, columns, vectors, D);
        }
        for (int64_t i = 0; i < vectors; ++i) {
            const int64_t query = first_query + i * width, count = smaller(queries - i * width, width);
            alignas(64) C seen[2][width] = {}, shrink[width];
            if (mixed)
                for (int64_t j = 0; j < count; ++j) {
                    const Run own = range_of(a, run.first + (i * width + j) / G, run.m);
                    seen[0][j] = C(larger(own.begin - begin, 0));
                    seen[1][j] = C(larger(smaller(own.end - begin, keys), 0));
                }
            C* x = at.logits + i * chunk_keys * width;
            E* p = at.probabilities;
            if constexpr (interleaved<E> == 1) p = x;
            store(shrink, softmax(at, x, p, query, count, keys, mixed ? seen : nullptr));
            multiply_values(at.product, static_cast<const E*>(p), static_cast<const E*>(at.values), count, padded, D);
            for (int64_t j = 0; j < count; ++j) {
                C* o = at.state.sums + (query + j) * D;
                const C* product = at.product + j * D;
                for (int64_t d = 0; d < D; d += width)
                    store(o + d, load<V>(o + d) * shrink[j] + load<V>(product + d));
            }
        }
    }

    void compute(const Part& part, int64_t kv, const Thread& at) const {
        pack_queries(part, kv, at);
        __builtin_memset(at.state.sums, 0, std::size_t((part.last - part.first) * G * D) * sizeof(C));
        for (int64_t i = 0; i < columns; i += width) {
            store(at.state.top + i, V{} - infinity<C>);
            store(at.state.total + i, V{});
        }
        int64_t place = 0;
        for_runs<C>(a, part.first, part.last, [&](const Run& run) {
            for (int64_t begin = run.begin; begin < run.end; begin += chunk_keys, ++place)
                if (place >= part.first_chunk && place < part.last_chunk)
                    chunk(run, begin, smaller(begin + chunk_keys, run.end), part.first, kv, at);
        });
    }

    // o of a block's rows, from the `count` states of its parts, which are `step` apart.
    void finish(const Part& part, int64_t kv, const State<C>* states, int64_t count, int64_t step) const {
        for (int64_t query = 0; query < (part.last - part.first) * G; ++query) {
            const int64_t n = part.first + query / G;
            T* o = static_cast<T*>(a.o) + (n * a.H + kv * G + query % G) * a.D;
            bool seen = false;
            for (int64_t m = 0; m < a.M; ++m) seen |= a.begins[n * a.M + m] < a.ends[n * a.M + m];
            if (!seen) {
                __builtin_memset(o, 0, std::size_t(a.D) * sizeof(T));
                continue;
            }
            C* sums = states[0].sums + query * D;
            C total = states[0].total[query];
            if (count > 1) {
                C top = -infinity<C>;
                for (int64_t i = 0; i < count; ++i) {
                    const C other = states[i * step].top[query];
                    top = other > top ? other : top;
                }
                total = 0;
                for (int64_t i = 0; i < count; ++i) {
                    const State<C>& state = states[i * step];
                    const C own = state.top[query];
                    const C weight = own == -infinity<C> ? C(0) : exponential2(V{} + (own - top) * C(log2_e))[0];
                    total += state.total[query] * weight;
                    const C* from = state.sums + query * D;
                    for (int64_t d = 0; d < D; d += width) {
                        const V part_sum = load<V>(from + d) * weight;
                        store(sums + d, i ? load<V>(sums + d) + part_sum : part_sum);
                    }
                }
            }
            const C inverse = C(1) / total;
            write(o, a.D, [=](int64_t d) { return sums[d] * inverse; });
        }
    }

    int64_t run() const {
        const int64_t wanted = (wanted_tasks + a.KV - 1) / a.KV;
        Arena arena(a.scratch);
        Part* parts = arena.take<Part>(a.N + wanted);
        State<C>* states = arena.take<State<C>>(2 * wanted * a.KV);
        Thread* scratch = arena.take<Thread>(a.num_threads);
        for (int64_t i = 0; i < 2 * wanted * a.KV; ++i)
            if (const State<C> state = take_state(arena); a.scratch) states[i] = state;
        for (int i = 0; i < a.num_threads; ++i)
            if (const Thread at = take_thread(arena); a.scratch) scratch[i] = at;
        if (!a.scratch) return arena.used();

        int64_t total = 0, count = 0, split = 0;
        for_blocks<C>(a, [&](int64_t, int64_t, int64_t cost, int64_t) { total += cost; });
        const int64_t most = larger(least_cost, (total + wanted - 1) / wanted);
        for_blocks<C>(a, [&](int64_t first, int64_t last, int64_t cost, int64_t chunks) {
            const int64_t number = larger(smaller((cost + most - 1) / most, chunks), 1);
            for (int64_t i = 0; i < number; ++i)
                parts[count++] = {first, last, chunks * i / number, chunks * (i + 1) / number, i, number, split + i};
            if (number > 1) split += number;
        });
#ifdef _OPENMP
        const int threads = total * a.KV * a.D < serial_cost ? 1 : a.num_threads;
#else
        const int threads = 1;
#endif
        for_tasks(count * a.KV, threads, [&](int64_t task, int thread) {
            const Part& part = parts[task / a.KV];
            const int64_t kv = task % a.KV;
            Thread at = scratch[thread];
            if (part.count > 1) at.state = states[part.state * a.KV + kv];
            compute(part, kv, at);
            if (part.count == 1) finish(part, kv, &at.state, 1, 0);
        });
        if (split)
            for_tasks(count * a.KV, threads, [&](int64_t task, int) {
                const Part& part = parts[task / a.KV];
                const int64_t kv = task % a.KV;
                if (part.count > 1 && part.index == 0)
                    finish(part, kv, states + part.state * a.KV + kv, part.count, a.KV);
            });
        return 0;
    }
};

}  // namespace

int64_t decode_attention(const DecodeAttention& a) {
    int64_t bytes = 0;
    with_type(a.dtype, [&](auto element) { bytes = Decode<decltype(element)>(a).run(); });
    return bytes;
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
