// Attention, backward: the log-sum-exp is known, a row belongs to a key, and pᵀ and dsᵀ come out as dv = pᵀ do and
// dk = dsᵀ q read them; dq is summed as dqᵀ = kᵀ dsᵀ.

#include "attention.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

// heads_at_once query heads of one key-value head go through a block of keys together: dk and dv are one product over
// all their queries, and, too large for L1, are read and written once for all heads.
constexpr int64_t backward_keys = 128, heads_at_once = 4, packed_queries = heads_at_once * query_block;

// One head's block of queries.
template <class C>
struct QueryBlock {
    void *query_columns, *dout_columns;  // qᵀ and doᵀ, packed [D, query_block], interleaved
    C* dquery;                           // dqᵀ, [D, query_block]
    C *lse, *delta;                      // of each query: its log-sum-exp, and Σ do o
    C* first;                            // of each query: the first key it sees
};

template <class C>
struct BackwardThread {
    QueryBlock<C> queries[heads_at_once];
    void *query_rows, *dout_rows;  // all heads' queries, packed [packed_queries, D], interleaved
    C *logits, *dlogits;           // [backward_keys, query_block]: sᵀ and dpᵀ
    void *probabilities, *left;    // all heads' pᵀ and dsᵀ, packed [backward_keys, packed_queries]
    void* right;                   // dsᵀ, packed [backward_keys, query_block], interleaved
    C* dquery_rows;                // dq, [query_block, D]
};

// pᵀ = e^(sᵀ - lse) and dsᵀ = pᵀ (dpᵀ - delta), for the rows of keys from `key` on, two at a time. `only`: these are all
// the keys that the queries see, and o is rounded so much that delta is better summed here.
template <class T, class E, class C>
void gradient_block(const Attention& a, const BackwardThread<C>& at, const QueryBlock<C>& of, E* probabilities,
                    E* left, int64_t query, int64_t padded, int64_t key, int64_t width, bool whole, bool only) {
    using V = vector_t<C>;
    E* right = static_cast<E*>(at.right);
    const C scale = C(a.soft_cap != 0 ? a.scale / a.soft_cap : a.scale), cap = C(a.soft_cap);
    for (int64_t i = 0; i < padded; i += lanes<C>) {
        const V lse = load<V>(of.lse + i), first = load<V>(of.first + i);
        const V place = counting<C>() + C(query + i);
        // No query of this panel sees a key behind its last one.
        const int64_t end = whole ? width : smaller(round_up(query + i + lanes<C> - key, 2), width);
        const int64_t row = i / panel * backward_keys * panel + i % panel;
        const auto seen = [&](int64_t r, V x) {
            if (whole) return x;
            const C s = C(key + r);
            return place < s ? V{} : s < first ? V{} : x;
        };
        const auto probability = [&](int64_t r, V& slope) {
            V x = load<V>(at.logits + r * query_block + i) * scale;
            // Rounded as lse is where it is one logit: the p of a query's only key is 1. Operands of two bytes round p.
            if constexpr (interleaved<E> == 1) x = rounded(x);
            if (cap != 0) {
                const V t = hyperbolic_tangent(x);
                x = t * cap;
                if constexpr (interleaved<E> == 1) x = rounded(x);
                slope = C(1) - t * t;
            }
            x -= lse;  // the difference first: it is small where p is not
            const V p = seen(r, sizeof(T) == 2 ? exponential2(x * C(log2_e)) : exponential(x));
            store_operand(probabilities + row + r * panel, p);
            return p;
        };
        const auto product = [&](int64_t r) { return load<V>(at.dlogits + r * query_block + i); };
        V delta = load<V>(of.delta + i), slope = V{} + C(1);
        if (only) {
            V sum = {};  // Σ p dp: do · o without the rounding of o
            for (int64_t r = 0; r < end; ++r) {
                const V p = probability(r, slope);
                sum += seen(r, p * product(r));
                store(at.logits + r * query_block + i, p * slope);
            }
            delta = sum;
        }
        for (int64_t r = 0; r < end; r += 2) {
            V ds[2];
            for (int n = 0; n < 2; ++n) {
                const V dp = product(r + n) - delta;
                const V weight = only ? load<V>(at.logits + (r + n) * query_block + i) : probability(r + n, slope) * slope;
                ds[n] = seen(r + n, weight * dp);
                store_operand(left + row + (r + n) * panel, ds[n]);
            }
            store_operands(right + packed(backward_keys, r, i / panel * panel) + i % panel * 2, ds[0], ds[1]);
        }
        for (int64_t r = end; r < width; ++r) {
            store_operand(probabilities + row + r * panel, V{});
            store_operand(left + row + r * panel, V{});
            if (r % 2 == 0)
                store_operands(right + packed(backward_keys, r, i / panel * panel) + i % panel * 2, V{}, V{});
        }
    }
}

// Blocks of queries are cut into so many chunks, each with sums of dk and dv of its own: enough tasks for the threads
// where units are few. It depends on the shape alone, and so does the result.
inline int64_t chunks_of(const Attention& a) {
    constexpr int64_t tasks = 16, rows = 512;
    const int64_t wanted = (tasks + a.B * a.KV - 1) / (a.B * a.KV);
    return larger(smaller(wanted, a.T * (a.H / a.KV) / rows), 1);
}

template <class T>
int64_t backward(const Attention& a) {
    using C = compute_t<T>;
    using E = operand_t<T>;
    const int64_t G = a.H / a.KV, D = round_up(a.D), length = round_up(a.T);
    const int64_t blocks = (a.T + query_block - 1) / query_block;
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
        const int64_t block = query_block * D;
        BackwardThread<C> at = {};
        for (QueryBlock<C>& of : at.queries)
            of = {arena.take<E>(block),       arena.take<E>(block),       arena.take<C>(block),
                  arena.take<C>(query_block), arena.take<C>(query_block), arena.take<C>(query_block)};
        at.query_rows = arena.take<E>(packed_queries * D), at.dout_rows = arena.take<E>(packed_queries * D);
        at.logits = arena.take<C>(area), at.dlogits = arena.take<C>(area), at.right = arena.take<E>(area);
        at.probabilities = arena.take<E>(area * heads_at_once), at.left = arena.take<E>(area * heads_at_once);
        at.dquery_rows = arena.take<C>(block);
        if (a.scratch) scratch[i] = at;
    }
    if (!a.scratch) return arena.used();

    const auto prepare = [&](const BackwardThread<C>& at, int64_t h, int64_t b, int64_t head, int64_t query,
                             int64_t end) {
        const QueryBlock<C>& of = at.queries[h];
        const int64_t padded = round_up(end - query), row = packed(packed_queries, h * padded, 0);
        const Rows<T> q = head_rows<T>(a.q, a.q_strides, b, head, query, end, a.D);
        const Rows<T> dout = head_rows<T>(a.dout, a.dout_strides, b, head, query, end, a.D);
        pack<Layout::interleaved_columns>(static_cast<E*>(of.query_columns), D, q, 0, padded, false);
        pack<Layout::interleaved_columns>(static_cast<E*>(of.dout_columns), D, dout, 0, padded, false);
        pack<Layout::interleaved_rows>(static_cast<E*>(at.query_rows) + row, packed_queries, q, 0, padded, true);
        pack<Layout::interleaved_rows>(static_cast<E*>(at.dout_rows) + row, packed_queries, dout, 0, padded, true);
        for (int64_t i = 0; i < padded; ++i) {
            if (query + i >= a.T) {  // no query: p = 2^-inf
                of.lse[i] = infinity<C>, of.delta[i] = 0, of.first[i] = 0;
                continue;
            }
            const T* o = static_cast<const T*>(a.o) + ((b * a.T + query + i) * a.H + head) * a.D;
            const C lse = static_cast<const C*>(a.lse)[(b * a.H + head) * a.T + query + i];
            const C delta = dot(o, dout.data + i * dout.stride, a.D);
            // A gradient that is not finite was packed as 0: it spreads to the keys seen through p.
            bool finite = is_finite(delta);
            if (!finite) {
                finite = true;
                for (int64_t d = 0; d < a.D; ++d) finite &= is_finite(dout.data[i * dout.stride + d]);
            }
            of.lse[i] = finite ? lse : C(__builtin_nan(""));
            of.delta[i] = delta, of.first[i] = C(first_key(a, b, query + i));
        }
    };

    const auto finish = [&](const BackwardThread<C>& at, const QueryBlock<C>& of, int64_t b, int64_t head,
                            int64_t query, int64_t end) {
        for (int64_t d = 0; d < D; d += panel)
            transpose(at.dquery_rows + d, D, of.dquery + d * query_block, query_block, round_up(end - query));
        for (int64_t t = query; t < end; ++t) {
            const C *row = at.dquery_rows + (t - query) * D, scale = C(a.scale);
            write(static_cast<T*>(a.dq) + ((b * a.T + t) * a.H + head) * a.D, a.D,
                  [=](int64_t d) { return row[d] * scale; });
        }
    };

    // Some heads' queries from `query` on: dq, and what they add to dk and dv, which stay in the cache for all of them.
    const auto block = [&](const BackwardThread<C>& at, int64_t unit, int64_t place, int64_t query, int64_t head,
                           int64_t heads, C* dkey, C* dvalue) {
        const int64_t b = unit / a.KV, end = smaller(query + query_block, a.T), padded = round_up(end - query);
        for (int64_t h = 0; h < heads; ++h) prepare(at, h, b, head + h, query, end);
        E *probabilities = static_cast<E*>(at.probabilities), *lefts = static_cast<E*>(at.left);
        const int64_t begin = first_key(a, b, query) / panel * panel, last_key = query + padded;
        // In full precision lse is rounded as much as o is.
        const bool only = sizeof(T) == 2 && last_key - begin <= backward_keys;
        for (int64_t key = begin; key < last_key; key += backward_keys) {
            const int64_t width = smaller(last_key - key, backward_keys), base = place * length * D;
            const bool whole = key + width - 1 <= query && first_key(a, b, end - 1) <= key;
            for (int64_t h = 0; h < heads; ++h) {
                const QueryBlock<C>& of = at.queries[h];
                multiply(at.logits, query_block, keys + base + packed(length, key, 0), length,
                         static_cast<const E*>(of.query_columns), D, width, padded, D, false);
                multiply(at.dlogits, query_block, values + base + packed(length, key, 0), length,
                         static_cast<const E*>(of.dout_columns), D, width, padded, D, false);
                E* left = lefts + packed(backward_keys, 0, h * padded);
                gradient_block<T>(a, at, of, probabilities + packed(backward_keys, 0, h * padded), left, query,
                                  padded, key, width, whole, only);
                if (a.dq)
                    multiply(of.dquery, query_block, key_columns + base + packed(D, 0, key), D,
                             interleaved<E> == 2 ? static_cast<const E*>(at.right) : left, backward_keys, D, padded,
                             width, key != begin);
            }
            if (a.dv)
                multiply(dvalue + key * D, D, static_cast<const E*>(probabilities), backward_keys,
                         static_cast<const E*>(at.dout_rows), packed_queries, width, D, heads * padded, true);
            if (a.dk)
                multiply(dkey + key * D, D, static_cast<const E*>(lefts), backward_keys,
                         static_cast<const E*>(at.query_rows), packed_queries, width, D, heads * padded, true);
        }
        for (int64_t h = 0; a.dq && h < heads; ++h) finish(at, at.queries[h], b, head + h, query, end);
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
                for (int64_t g = 0; g < G; g += heads_at_once) {
                    const int64_t unit = first + place, head = unit % a.KV * G + g;
                    block(scratch[thread], unit, place, i * query_block, head, smaller(G - g, heads_at_once), dkey,
                          dvalue);
                }
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

int64_t attention_backward(const Attention& a) {
    if (!starts_fit(a)) return -1;
    return with_type(a.dtype, [&](auto element) { return backward<decltype(element)>(a); });
}

#define FIELD(name) COGSYM_FIELD(Attention, name)
constexpr Field fields[] = {COGSYM_ATTENTION_FIELDS, FIELD(dout), FIELD(dout_strides), FIELD(dq), FIELD(dk), FIELD(dv)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(attention_backward) = {
    kernel<attention_backward>("attention_backward", "dq, dk and dv, each unless its address is 0.", fields), {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
