// The head's statistics of scored tokens, in one pass: products with the vocabulary's weights by AMX, and of each 32 x
// 32 of them, while they lie in L1, maximum, argmax and sum of exponentials. Contract in
// cogsym/ops/linear_cross_entropy.py. Logits are never rounded to bfloat16. Where the processor has no AMX, or for other
// types, there is nothing here: the blocks of linear_cross_entropy.cpp serve.

#include "attention.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

// All columns of the logits of bfloat16 tokens; statistics as linear_cross_entropy.cpp has them.
struct TokenScores {
    const void* hidden;  // [N, D]
    int64_t hidden_stride;
    const void* weight;  // [V, D]
    int64_t weight_stride;
    const int64_t* targets;  // [N]
    float *maximum, *total, *target_logit;  // [N]
    int64_t* argmax;                        // [N]
    int64_t N, V, D;
    double scale;
    int num_threads;
    Scratch scratch;
};

#ifdef __AMX_BF16__

constexpr int64_t half = panel / 2;
// What a task takes: tokens, which stay in L2 while its columns of the vocabulary pass, and these columns.
constexpr int64_t task_rows = 1024, task_columns = 2048;

using ints = vector_t<int32_t>;

// What a token's logits have been so far in a task, by token.
struct Seen {
    float *top, *total;
    int32_t* place;
};

struct TokenScorer {
    const TokenScores& a;
    int64_t D, N, chunks;

    explicit TokenScorer(const TokenScores& arguments)
        : a(arguments),
          D(round_up(a.D)),
          N(round_up(a.N)),
          chunks((a.V + task_columns - 1) / task_columns) {}

    // to[32 words of the vocabulary][16 tokens] for two times 16 tokens, one behind the other.
    void multiply_panel(float* to, const bfloat16* words, const bfloat16* tokens) const {
        constexpr int64_t line = panel * sizeof(bfloat16), to_line = half * sizeof(float);
        __asm__ volatile("" ::: "memory");
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t d = 0; d < D; d += panel) {
            const bfloat16 *left = words + d * panel, *right = tokens + d * panel;
            _tile_loadd(4, left, line);
            // The tokens are streamed past L1; the rows of the vocabulary stay in it.
            _tile_stream_loadd(6, right, 2 * line);
            _tile_dpbf16ps(0, 4, 6);
            _tile_stream_loadd(7, right + panel, 2 * line);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, left + half * panel, line);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, to_line);
        _tile_stored(2, to + half * half, to_line);
        _tile_stored(1, to + panel * half, to_line);
        _tile_stored(3, to + panel * half + half * half, to_line);
        __asm__ volatile("" ::: "memory");
    }

    // `count` words, from `first` on, of 16 tokens; z is [count][16] products.
    static inline __attribute__((always_inline)) void see(const Seen& seen, int64_t token, const float* z,
                                                          int64_t first, int64_t count, float scale) {
        const floats before = load<floats>(seen.top + token);
        floats tops[2] = {before, before};
#pragma GCC unroll 8
        for (int64_t i = 0; i < count; ++i) {
            const floats x = load<floats>(z + i * half);
            tops[i % 2] = x > tops[i % 2] ? x : tops[i % 2];
        }
        const floats top = tops[0] > tops[1] ? tops[0] : tops[1];
        floats total = load<floats>(seen.total + token);
        if (_mm512_cmp_ps_mask((__m512)top, (__m512)before, _CMP_GT_OQ)) {  // seldom, once a few have been seen
            ints place = load<ints>(seen.place + token);
            for (int64_t i = count - 1; i >= 0; --i) {
                const floats x = load<floats>(z + i * half);
                place = (x == top) & (top > before) ? ints{} + int32_t(first + i) : place;
            }
            store(seen.place + token, place);
            store(seen.top + token, top);
            total *= exponential2((before - top) * scale);
        }
        // Where all are -inf so far, any finite shift makes the exponentials 0.
        const floats shift = top == -infinity<float> ? floats{} : top;
        floats sums[2] = {};
#pragma GCC unroll 8
        for (int64_t i = 0; i < count; ++i)
            sums[i % 2] += exponential2((load<floats>(z + i * half) - shift) * scale);
        store(seen.total + token, total + (sums[0] + sums[1]));
    }

    int64_t run() const {
        Arena arena(a.scratch);
        bfloat16* tokens = arena.take<bfloat16>(N * D);
        Seen seen{arena.take<float>(chunks * N), arena.take<float>(chunks * N), arena.take<int32_t>(chunks * N)};
        bfloat16* words = arena.take<bfloat16>(a.num_threads * panel * D);
        float* products = arena.take<float>(a.num_threads * 2 * panel * panel);
        if (!a.scratch) return arena.used();

        const Rows<bfloat16> hidden{static_cast<const bfloat16*>(a.hidden), a.hidden_stride, a.N, a.D};
        for_tasks(N / panel, a.num_threads, [&](int64_t task, int) {
            pack<Layout::interleaved_columns>(tokens, D, hidden, task * panel, panel, false);
        });
        const float scale = float(a.scale * 1.4426950408889634);
        for_tasks((N + task_rows - 1) / task_rows * chunks, a.num_threads, [&](int64_t task, int thread) {
            const int64_t chunk = task % chunks, first = task / chunks * task_rows;
            const int64_t last = smaller(first + task_rows, N), end = smaller((chunk + 1) * task_columns, a.V);
            const Seen own{seen.top + chunk * N, seen.total + chunk * N, seen.place + chunk * N};
            for (int64_t i = first; i < last; i += half) {
                store(own.top + i, floats{} - infinity<float>);
                store(own.total + i, floats{});
                store(own.place + i, ints{} + int32_t(chunk * task_columns));
            }
            bfloat16* left = words + thread * panel * D;
            float* z = products + thread * 2 * panel * panel;
            int64_t turn = 0;  // the next products need not wait for what is done to the last
            for (int64_t word = chunk * task_columns; word < end; word += panel) {
                const int64_t count = smaller(panel, end - word);
                const Rows<bfloat16> weight{static_cast<const bfloat16*>(a.weight) + word * a.weight_stride,
                                            a.weight_stride, count, a.D};
                const int64_t rows_ahead = larger(panel * panel / (last - first), 1);
                pack<Layout::rows>(left, panel, weight, 0, panel, false);
                const char* next = reinterpret_cast<const char*>(weight.data + panel * a.weight_stride);
                int64_t row = word + panel < end ? 0 : panel;  // of the next block, which comes from memory
                for (int64_t i = first; i < last; i += panel, turn ^= panel * panel) {
                    for (const int64_t to = row + rows_ahead; row < to && row < panel; ++row)
                        for (int64_t byte = 0; byte < a.D * int64_t(sizeof(bfloat16)); byte += 64)
                            __builtin_prefetch(next + row * a.weight_stride * int64_t(sizeof(bfloat16)) + byte, 0, 2);
                    multiply_panel(z + turn, left, tokens + i * D);
                    for (int64_t j = 0; j < panel; j += half)
                        if (count == panel)
                            see(own, i + j, z + turn + panel * j, word, panel, scale);
                        else
                            see(own, i + j, z + turn + panel * j, word, count, scale);
                }
            }
        });
        parallel_for(a.N, a.N * (chunks + a.D), a.num_threads, [&](int64_t n) { finish(n, seen, scale); });
        return 0;
    }

    void finish(int64_t n, const Seen& seen, float scale) const {
        int64_t best = 0;
        for (int64_t i = 1; i < chunks; ++i)
            if (seen.top[i * N + n] > seen.top[best * N + n]) best = i;
        const float top = seen.top[best * N + n], shift = top == -infinity<float> ? 0.0f : top;
        float total = 0;
        for (int64_t i = 0; i < chunks; ++i)
            total += seen.total[i * N + n] * exponential2(floats{} + (seen.top[i * N + n] - shift) * scale)[0];
        a.maximum[n] = top;
        a.total[n] = total;
        a.argmax[n] = seen.place[best * N + n];
        const bfloat16* x = static_cast<const bfloat16*>(a.hidden) + n * a.hidden_stride;
        const bfloat16* w = static_cast<const bfloat16*>(a.weight) + a.targets[n] * a.weight_stride;
        float product = 0;
#pragma omp simd reduction(+ : product)
        for (int64_t d = 0; d < a.D; ++d) product += widen(x[d]) * widen(w[d]);
        a.target_logit[n] = product * float(a.scale);
    }
};

int64_t token_scores(const TokenScores& a) { return TokenScorer(a).run(); }
#else
int64_t token_scores(const TokenScores&) { return -1; }
#endif

#define FIELD(name) COGSYM_FIELD(TokenScores, name)
constexpr Field fields[] = {
    FIELD(hidden), FIELD(hidden_stride), FIELD(weight), FIELD(weight_stride), FIELD(targets), FIELD(maximum),
    FIELD(total), FIELD(target_logit), FIELD(argmax), FIELD(N), FIELD(V), FIELD(D), FIELD(scale), FIELD(num_threads),
    FIELD(scratch)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(token_scores) = {
    kernel<token_scores>("token_scores",
                         "All columns at once, in bfloat16. False where this processor has no instruction for it.",
                         fields),
    {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
