// Attention of single rows over ranges of a flat store: contract and formula in cogsym/ops/decode_attention.py.

#include "decode_attention.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

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
        if (!in_products(a))
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

        const C exponent = C(unit_of(a) * log2_e);
        const V before = load<V>(at.state.top + query), total_before = load<V>(at.state.total + query);
        const V top = tops[0] > before ? tops[0] : before;
        // No finite logit yet: the difference below must stay -inf, and a NaN a NaN.
        const V shift = top == none ? V{} : top;
        const V shrink = before == none ? V{} : exponential2((before - shift) * exponent);
        V total = total_before * shrink;
        exponentials(p, x, keys, exponent, shift, total);
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
        const Rows<T> k = rows_of(a.k, a.k_strides, kv, begin, end), v = rows_of(a.v, a.v_strides, kv, begin, end);
        const auto fetch = [&](int64_t key, int64_t count) {
            for (int64_t i = key; i < smaller(key + count, run.end - begin); ++i) {
                prefetch(k.data + i * k.stride, a.D);
                prefetch(v.data + i * v.stride, a.D);
            }
        };
        bool spoilt = false;
        if (begin == run.begin) fetch(0, fetched_keys);
        for (int64_t key = 0; key < padded; key += panel) {
            fetch(key + fetched_keys, panel);
            spoilt |= pack<Layout::interleaved_rows>(at.values, chunk_keys, v, key, panel, mixed);
            const T* from = k.data + key * k.stride;
            Keys<E> left = {at.keys, panel, panel * panel};
            if (sizeof(T) == sizeof(E) && a.D % panel == 0 && key + panel <= keys)
                left = {reinterpret_cast<const E*>(from), k.stride, panel};
            else
                pack<Layout::rows>(at.keys, panel, Rows<T>{from, k.stride, keys - key, a.D}, 0, panel, false);
            multiply_keys(at.logits + key * width, chunk_keys * width, left,
                          static_cast<const E*>(at.queries) + first_query * interleaved<E>, columns, vectors, D);
        }
        if (spoilt && mixed) {  // 0 · NaN: each row meets the values that it sees, and no other
            for (int64_t n = run.first; n < run.last; ++n) {
                const Run own = range_of(a, n, run.m);
                const int64_t from = larger(own.begin, begin), to = smaller(own.end, end);
                if (from < to) chunk(own, from, to, row, kv, at);
            }
            return;
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
        for_ranges<C>(a, part.first, part.last, [&](const Run& run) {
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
            C total = states[0].total[query], top = states[0].top[query];
            if (count > 1) {
                top = -infinity<C>;
                for (int64_t i = 0; i < count; ++i) {
                    const C other = states[i * step].top[query];
                    top = other > top ? other : top;
                }
                total = 0;
                for (int64_t i = 0; i < count; ++i) {
                    const State<C>& state = states[i * step];
                    const C own = state.top[query];
                    const C weight = own == -infinity<C> ? C(0) : exponential2(V{} + (own - top) * C(unit_of(a) * log2_e))[0];
                    total += state.total[query] * weight;
                    const C* from = state.sums + query * D;
                    for (int64_t d = 0; d < D; d += width) {
                        const V part_sum = load<V>(from + d) * weight;
                        store(sums + d, i ? load<V>(sums + d) + part_sum : part_sum);
                    }
                }
            }
            const C *sinks = static_cast<const C*>(a.sinks);
            const C factor = sinks ? with_sink(top * C(unit_of(a)), total, sinks[kv * G + query % G]).factor : C(1) / total;
            write(o, a.D, [=](int64_t d) { return sums[d] * factor; });
        }
    }

    // Negative where a range leaves the store.
    int64_t run() const {
        if (!a.scratch)
            for (int64_t i = 0; i < a.N * a.M; ++i)
                if (a.begins[i] < 0 || a.ends[i] > a.S) return -1;
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

int64_t decode_attention(const DecodeAttention& a) {
    return with_type(a.dtype, [&](auto element) { return Decode<decltype(element)>(a).run(); });
}

#define FIELD(name) COGSYM_FIELD(DecodeAttention, name)
constexpr Field fields[] = {
    FIELD(q), FIELD(q_strides), FIELD(k), FIELD(k_strides), FIELD(v), FIELD(v_strides), FIELD(begins), FIELD(ends),
    FIELD(sinks), FIELD(N), FIELD(M), FIELD(S), FIELD(H), FIELD(KV), FIELD(D), FIELD(scale), FIELD(soft_cap), FIELD(dtype),
    FIELD(num_threads), FIELD(scratch), FIELD(o)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(decode_attention) = {kernel<decode_attention>("decode_attention", "o. False where a range leaves the store.", fields), {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
