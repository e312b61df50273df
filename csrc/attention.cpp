// Attention, forward: a row of logits belongs to a query, whose maximum the softmax needs.

#include "attention.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

constexpr int64_t forward_keys = 512;
// Rows a power of two apart would meet in the same few lines of the cache.
constexpr int64_t logits_stride = forward_keys + 16;

template <class C>
struct ForwardThread {
    void* query;          // packed [query_block, D]
    C* logits;            // [query_block, forward_keys], rows logits_stride apart
    C* sums;              // o before its division, [query_block, D]
    void* probabilities;  // packed [query_block, forward_keys]
    C *top, *total;       // of each row: the largest logit, and Σ e^(logit - top), a vector of parts
};

// Logits of the queries' rows to probabilities, unnormalised, and the rows' sums brought to the new maximum.
template <class E, class C>
void softmax_block(const Attention& a, const ForwardThread<C>& at, int64_t b, int64_t query, int64_t rows,
                   int64_t key, int64_t width, int64_t padded_D) {
    using V = vector_t<C>;
    constexpr int64_t step = lanes<C>, stride = query_block * panel;
    const bool capped = a.soft_cap != 0;
    const C factor = C(capped ? a.scale / a.soft_cap : a.scale), cap = C(a.soft_cap);
    const V place = counting<C>(), none = V{} - infinity<C>;
    const bool scaled = in_products(a);
    const C exponent = C(unit_of(a) * log2_e);
    for (int64_t r = 0; r < rows; ++r) {
        C* x = at.logits + r * logits_stride;
        const int64_t first = larger(first_key(a, b, query + r) - key, 0), last = query + r - key;
        // Panels in which this query sees a key; the others are zeros.
        const int64_t begin = smaller(first / panel * panel, width);
        const int64_t end = larger(smaller(round_up(last + 1), width), begin);
        if (!scaled)
            for (int64_t i = begin; i < end; i += step) {
                const V y = load<V>(x + i) * factor;
                store(x + i, capped ? hyperbolic_tangent(y) * cap : y);
            }
        const auto mask = [&](int64_t edge) {
            for (int64_t i = edge; i < edge + panel; i += step) {
                const V y = load<V>(x + i);
                store(x + i, place < C(first - i) ? none : place > C(last - i) ? none : y);
            }
        };
        if (begin < first && begin < end) mask(begin);
        if (last < end - 1) mask(end - panel);
        V tops[2] = {none, none};
        for (int64_t i = begin; i < end; i += 2 * step)
            for (int64_t n = 0; n < 2; ++n) {
                const V y = load<V>(x + i + n * step);
                tops[n] = y > tops[n] ? y : tops[n];
            }
        const C block_top = largest<C>(tops[0] > tops[1] ? tops[0] : tops[1], -infinity<C>);
        const C top = block_top > at.top[r] ? block_top : at.top[r];
        // No finite logit yet: the difference below must stay -inf, and a NaN a NaN.
        const C shift = top == -infinity<C> ? C(0) : top;
        E* to = static_cast<E*>(at.probabilities) + r * panel;
        for (int64_t i = 0; i < begin; i += panel) __builtin_memset(to + i / panel * stride, 0, panel * sizeof(E));
        for (int64_t i = end; i < width; i += panel) __builtin_memset(to + i / panel * stride, 0, panel * sizeof(E));
        V sums[2] = {load<V>(at.total + r * step), V{}};
        if (top != at.top[r] && at.top[r] != -infinity<C>) {
            const C shrink = exponential2(V{} + (at.top[r] - top) * exponent)[0];
            sums[0] *= shrink;
            C* o = at.sums + r * padded_D;
            for (int64_t i = 0; i < padded_D; i += step) store(o + i, load<V>(o + i) * shrink);
        }
        at.top[r] = top;
        for (int64_t i = begin; i < end; i += panel) {
            V p[panel / step];
            for (int64_t j = 0; j < panel / step; ++j) {
                p[j] = exponential2((load<V>(x + i + j * step) - shift) * exponent);
                sums[j % 2] += p[j];
            }
            store_panel(to + i / panel * stride, p);
        }
        store(at.total + r * step, sums[0] + sums[1]);
    }
}

// Of one key, from its product with the query; 0 or not is what counts, where the value is infinite.
template <class T, class C = compute_t<T>>
C probability(const Attention& a, C product, C lse) {
    const C x = product * C(a.scale);
    const C logit = a.soft_cap == 0 ? x : C(a.soft_cap * __builtin_tanh(x / a.soft_cap));
    return exponential(logit > lse ? C(0) : logit - lse);  // a NaN stays one
}

template <class T>
int64_t forward(const Attention& a) {
    using C = compute_t<T>;
    using E = operand_t<T>;
    const int64_t G = a.H / a.KV, D = round_up(a.D), length = round_up(a.T);
    const int64_t blocks = (a.T + query_block - 1) / query_block;
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
            const C total = sum_of<C>(load<vector_t<C>>(at.total + r * lanes<C>));
            const C top = at.top[r] * C(unit_of(a));
            Sunk<C> result = {C(1) / total, C(top + __builtin_log(total))};
            if (a.sinks) result = with_sink(top, total, static_cast<const C*>(a.sinks)[head]);
            const C factor = result.factor;
            if (spoilt) {
                const Rows<T> q = head_rows<T>(a.q, a.q_strides, b, head, t, t + 1, a.D);
                const Rows<T> k = head_rows<T>(a.k, a.k_strides, b, kv, 0, t + 1, a.D);
                const Rows<T> v = head_rows<T>(a.v, a.v_strides, b, kv, 0, t + 1, a.D);
                for (int64_t s = first_key(a, b, t); s <= t; ++s)
                    for (int64_t d = 0; d < a.D; ++d)
                        if (const T x = v.data[s * v.stride + d]; !is_finite(x))
                            sums[d] += probability<T>(a, dot(q.data, k.data + s * k.stride, a.D), result.lse) * widen(x);
            }
            write(static_cast<T*>(a.o) + ((b * a.T + t) * a.H + head) * a.D, a.D,
                  [=](int64_t d) { return sums[d] * factor; });
            static_cast<C*>(a.lse)[(b * a.H + head) * a.T + t] = result.lse;
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

int64_t attention(const Attention& a) {
    if (!starts_fit(a)) return -1;
    return with_type(a.dtype, [&](auto element) { return forward<decltype(element)>(a); });
}

constexpr Field fields[] = {COGSYM_ATTENTION_FIELDS, COGSYM_FIELD(Attention, sinks)};

}  // namespace

COGSYM_KERNELS(attention) = {kernel<attention>("attention", "o and lse.", fields), {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
