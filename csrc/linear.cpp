// Products with weights that stay in their own element type: contracts and formulas in cogsym/ops/linear.py and
// cogsym/ops/int8_linear.py.

#include "few_rows.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

// y = x W' + b in float, rounded once; W' is the weight, or its transpose.
struct Linear {
    const void* x;       // [M, K], rows x_stride apart
    const void* weight;  // [K, N], or with `transposed` [N, K], rows weight_stride apart
    const float* scale;  // of each row of a weight of 8-bit integers; null where it is floating point
    const void* bias;    // [N], or null
    void* y;             // [M, N] contiguous
    int64_t x_stride, weight_stride, M, N, K;
    bool transposed;
    DType dtype, weight_dtype, bias_dtype;
    int num_threads;
    Scratch scratch;
};

// Rows, columns and depth of the blocks: a panel of B of `depth` takes half of a first cache of 32 KiB, a block of A
// most of half a second cache of 512 KiB. A weight is packed anew for every `span` rows.
constexpr int64_t rows_block = 24 * 8 / lanes<float> * strip, columns_block = 2048, most_depth = 320;
constexpr int64_t span = 8 * rows_block;

inline int64_t blocks(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Depths of almost the same size: a short one spends its time on sums.
inline int64_t depth_of(int64_t K) { return smaller(K, round_up(blocks(K, blocks(K, most_depth)), lanes<float>)); }

// Which part of the outcome a thread makes: the grid of threads whose largest part is smallest.
struct Grid {
    int64_t down, across, rows, columns;
    Grid(int64_t M, int64_t N, int64_t threads) {
        int64_t least = -1;
        for (int64_t d = 1; d <= threads; ++d) {
            if (threads % d) continue;
            const int64_t r = blocks(blocks(M, strip), d), c = blocks(blocks(N, width), threads / d);
            if (least >= 0 && r * c >= least) continue;
            least = r * c, down = d, across = threads / d, rows = r * strip, columns = c * width;
        }
    }
};

template <class T, class W>
class Multiplier {
  public:
    Multiplier(const Linear& a, Grid grid, char* memory, int64_t each) : a_(a), grid_(grid), memory_(memory), each_(each) {}

    // Bytes that one thread works in.
    static int64_t scratch_bytes(const Linear& a, const Grid& grid) {
        Arena arena({nullptr});
        Work(arena, a, grid);
        return arena.used();
    }

    void part(int64_t index) const {
        const int64_t top = index / grid_.across * grid_.rows, left = index % grid_.across * grid_.columns;
        const int64_t bottom = smaller(top + grid_.rows, a_.M), right = smaller(left + grid_.columns, a_.N);
        Arena arena({memory_ + index * each_});
        const Work work(arena, a_, grid_);
        for (int64_t m = top; m < bottom; m += span)
            for (int64_t n = left; n < right; n += columns_block)
                block(work, m, smaller(span, bottom - m), n, smaller(columns_block, right - n));
    }

  private:
    struct Work {
        float *left, *right, *sums, *bias;
        Work(Arena& arena, const Linear& a, const Grid& grid) {
            const int64_t depth = depth_of(a.K), columns = smaller(columns_block, grid.columns);
            left = arena.take<float>(smaller(rows_block, grid.rows) * depth + strip_slack);
            right = arena.take<float>(columns * depth);
            sums = arena.take<float>(in_place ? 0 : smaller(span, grid.rows) * columns);
            bias = arena.take<float>(columns);
        }
    };
    // Sums are made in y where they have its type.
    static constexpr bool in_place = sizeof(T) == sizeof(float);

    void block(const Work& work, int64_t m, int64_t rows, int64_t n, int64_t columns) const {
        T* const y = static_cast<T*>(a_.y) + m * a_.N + n;
        float* const c = in_place ? reinterpret_cast<float*>(y) : work.sums;
        const int64_t stride = in_place ? a_.N : columns;
        const Rows<T> x = {static_cast<const T*>(a_.x), a_.x_stride, a_.M, a_.K};
        const Rows<W> weight = {static_cast<const W*>(a_.weight), a_.weight_stride, 0, 0};
        const int64_t most = depth_of(a_.K);
        for (int64_t k = 0; k < a_.K; k += most) {
            const int64_t depth = smaller(most, a_.K - k);
            if (a_.transposed)
                pack_panels_transposed(work.right, weight, k, depth, n, columns, a_.scale);
            else
                pack_panels(work.right, weight, k, depth, n, columns, a_.scale);
            for (int64_t i = 0; i < rows; i += rows_block) {
                const int64_t count = smaller(rows_block, rows - i);
                pack_strips(work.left, x, m + i, count, k, depth);
                multiply_packed(c + i * stride, stride, count, columns, work.left, work.right, depth, k > 0);
            }
        }
        if (in_place && !a_.bias) return;
        load_bias(a_, n, columns, work.bias);
        for (int64_t i = 0; i < rows; ++i)
            write(y + i * a_.N, columns, [&](int64_t j) { return c[i * stride + j] + work.bias[j]; });
    }

    static void load_bias(const Linear& a, int64_t n, int64_t columns, float* to) {
        for (int64_t i = 0; i < columns; ++i) to[i] = 0;
        if (a.bias)
            with_type(a.bias_dtype, [&](auto element) {
                const auto* from = static_cast<const decltype(element)*>(a.bias) + n;
                for (int64_t i = 0; i < columns; ++i) to[i] = float(widen(from[i]));
            });
    }

    const Linear& a_;
    const Grid grid_;
    char* const memory_;
    const int64_t each_;
};

// For few rows of x: by digits where there are such; else with up to `most_dotted` by dot products, with more by spreading
// each weight over them. Spreading takes too long for what is not two of bfloat16 in a word.
template <class T, class W>
class Streamer {
  public:
    static constexpr int64_t unit = in_digits<T, W> ? 2 * tile : 24;

    explicit Streamer(const Linear& a)
        : a_(a), dotted_(dotted(a)), row_(round_up(a.K, pair)), x_(static_cast<float*>(a.scratch.memory)) {
        const Rows<T> x = {static_cast<const T*>(a.x), a.x_stride, a.M, a.K};
        if constexpr (in_digits<T, W>) {
            int8_t* const to = reinterpret_cast<int8_t*>(x_ + most_spread);
            for (int64_t m = 0; m < a.M; ++m)
                x_[m] = arrange_digits(to, x.data + m * x.stride, a.K, tiles(a), m);
        } else if (dotted_)
            for (int64_t m = 0; m < a.M; ++m) arrange<W>(x_ + m * row_, x.data + m * x.stride, a.K);
        else
            pack_panels_transposed(x_, x, 0, a.K, 0, a.M);
    }

    // Whether so few rows are fastest so.
    static bool takes(const Linear& a) {
        return a.transposed && a.M <= (sizeof(W) == 2 && !in_words<W> ? most_dotted : most_spread);
    }

    static int64_t scratch_bytes(const Linear& a) {
        if (in_digits<T, W>)
            return most_spread * int64_t(sizeof(float)) + tiles(a) * tile * round_up(a.K, tile_depth);
        const int64_t values = dotted(a) ? a.M * round_up(a.K, pair) : round_up(a.M, width) * a.K;
        return values * int64_t(sizeof(float));
    }

    // Columns [unit index, unit (index + 1)) of y.
    void part(int64_t index) const {
        const int64_t n = index * unit, columns = smaller(unit, a_.N - n);
        if constexpr (in_digits<T, W>) {
            const Multiplying configured;
            for (int64_t c = 0; c < columns; c += tile) by_digits<1>(n + c, smaller(tile, columns - c));
        } else if (dotted_) {
            for (int64_t m = 0; m < a_.M; m += dotted_together) dot<dotted_together>(m, a_.M - m, n, columns);
        } else {
            for (int64_t m = 0; m < a_.M; m += width) {
                if (a_.M - m <= width / 2)
                    spread_rows<tile_vectors / 2>(m, n, columns);
                else
                    spread_rows<tile_vectors>(m, n, columns);
            }
        }
    }

  private:
    static constexpr int64_t most_dotted = 6, most_spread = 32;
    static bool dotted(const Linear& a) { return quantised<W> || a.M <= most_dotted; }
    static constexpr int dotted_together = vector_bytes == 64 ? 6 : 3;  // whose sums with four columns fit the registers

    template <int rows>
    void dot(int64_t m, int64_t count, int64_t n, int64_t columns) const {
        if constexpr (rows > 1)
            if (count < rows) return dot<rows - 1>(m, count, n, columns);
        constexpr int together = rows == 1 ? 8 : 4;
        int64_t c = 0;
        for (; c + together <= columns; c += together) dot_columns<rows, together>(m, n + c);
        for (; c < columns; ++c) dot_columns<rows, 1>(m, n + c);
    }

    template <int rows, int columns>
    void dot_columns(int64_t m, int64_t n) const {
        float out[rows][columns];
        dots<rows, columns>(out, x_ + m * row_, row_, weight(n), a_.weight_stride, a_.K);
        for (int c = 0; c < columns; ++c) put(m, rows, n + c, [&](int64_t r) { return out[r][c]; });
    }

    template <int vectors>
    void spread_rows(int64_t m, int64_t n, int64_t columns) const {
        constexpr int together = (vector_bytes == 64 ? 12 : strip) * tile_vectors / vectors;
        static_assert(unit % together == 0, "a unit is whole");
        int64_t c = 0;
        for (; c + together <= columns; c += together) spread_columns<vectors, together>(m, n + c);
        for (; c < columns; ++c) spread_columns<vectors, 1>(m, n + c);
    }

    template <int vectors, int columns>
    void spread_columns(int64_t m, int64_t n) const {
        alignas(64) float out[columns][width];
        spread_products<vectors, columns>(out, x_ + m * a_.K, weight(n), a_.weight_stride, a_.K);
        for (int c = 0; c < columns; ++c)
            put(m, smaller(width, a_.M - m), n + c, [&](int64_t r) { return out[c][r]; });
    }

    static int64_t tiles(const Linear& a) { return blocks(digits * a.M, tile); }

    template <int count>
    void by_digits(int64_t n, int64_t columns) const {
        if constexpr (count < most_tiles)
            if (count < tiles(a_)) return by_digits<count + 1>(n, columns);
        alignas(64) int32_t out[most_tiles * tile][tile];
        const int8_t* const x = reinterpret_cast<const int8_t*>(x_ + most_spread);
        digit_products<count>(out, x, weight(n), a_.weight_stride, columns, a_.K);
        float bias[tile] = {};
        if (a_.bias)
            with_type(a_.bias_dtype, [&](auto element) {
                const auto* from = static_cast<const decltype(element)*>(a_.bias) + n;
                for (int64_t c = 0; c < columns; ++c) bias[c] = float(widen(from[c]));
            });
        for (int64_t m = 0; m < a_.M; ++m) {
            const auto* const sums = out + digits * m;
            const float unit_of_x = x_[m];
            write(static_cast<T*>(a_.y) + m * a_.N + n, columns, [&](int64_t c) {
                const float sum = float(sums[2][c]) * 65536 + float(sums[1][c]) * 256 + float(sums[0][c]);
                return sum * unit_of_x * a_.scale[n + c] + bias[c];
            });
        }
    }

    const W* weight(int64_t n) const { return static_cast<const W*>(a_.weight) + n * a_.weight_stride; }

    // A column of y.
    template <class F>
    void put(int64_t m, int64_t rows, int64_t n, F value) const {
        float bias = 0;
        if (a_.bias)
            with_type(a_.bias_dtype,
                      [&](auto element) { bias = float(widen(static_cast<const decltype(element)*>(a_.bias)[n])); });
        T* const y = static_cast<T*>(a_.y) + m * a_.N + n;
        for (int64_t r = 0; r < rows; ++r) {
            if constexpr (quantised<W>)
                y[r * a_.N] = narrow<T>(value(r) * a_.scale[n] + bias);
            else
                y[r * a_.N] = narrow<T>(value(r) + bias);
        }
    }

    const Linear& a_;
    const bool dotted_;
    const int64_t row_;  // of x, arranged
    float* const x_;
};

template <class T, class W>
int64_t run(const Linear& a) {
    const int64_t work = a.M * a.N * a.K / 16;  // a product takes a fraction of what parallel_for counts an element for
    if (Streamer<T, W>::takes(a)) {
        if (!a.scratch) return Streamer<T, W>::scratch_bytes(a);
        const Streamer<T, W> streamer(a);
        parallel_for(blocks(a.N, streamer.unit), work, a.num_threads, [&](int64_t i) { streamer.part(i); });
        return 0;
    }
    const int threads = work < serial_elements ? 1 : a.num_threads;
    const Grid grid(a.M, a.N, threads);
    const int64_t each = Multiplier<T, W>::scratch_bytes(a, grid);
    if (!a.scratch) return each * threads;
    const Multiplier<T, W> multiplier(a, grid, static_cast<char*>(a.scratch.memory), each);
    parallel_for(threads, work, threads, [&](int64_t i) { multiplier.part(i); });
    return 0;
}

template <class F>
int64_t with_half_or_float(DType dtype, F f) {
    switch (dtype) {
        case DType::float32: return f(float{});
        case DType::bfloat16: return f(bfloat16{});
        case DType::float16: return f(float16{});
        case DType::float64: return -1;
    }
    __builtin_unreachable();
}

int64_t linear(const Linear& a) {
    return with_half_or_float(a.dtype, [&](auto x) {
        if (a.scale) return run<decltype(x), int8_t>(a);
        return with_half_or_float(a.weight_dtype, [&](auto w) { return run<decltype(x), decltype(w)>(a); });
    });
}

#define FIELD(name) COGSYM_FIELD(Linear, name)
constexpr Field fields[] = {FIELD(x), FIELD(weight), FIELD(scale), FIELD(bias), FIELD(y), FIELD(x_stride),
                            FIELD(weight_stride), FIELD(M), FIELD(N), FIELD(K), FIELD(transposed), FIELD(dtype),
                            FIELD(weight_dtype), FIELD(bias_dtype), FIELD(num_threads), FIELD(scratch)};
#undef FIELD

// A weight of 8-bit integers as the numbers that they stand for, each rounded once.
struct Dequantised {
    const int8_t* weight;  // [N, K], rows weight_stride apart
    const float* scale;    // [N]
    void* out;             // [N, K] contiguous
    int64_t weight_stride, N, K;
    DType dtype;  // of out
    int num_threads;
};

template <class T>
inline void scale_row(T* to, const int8_t* from, float scale, int64_t n) {
    write(to, n, [&](int64_t i) { return widen(from[i]) * scale; });
}
#ifdef __AVX512BF16__
inline void scale_row(bfloat16* to, const int8_t* from, float scale, int64_t n) {
    constexpr int64_t step = 2 * lanes<float>;
    const auto convert = [&](bfloat16* out, const int8_t* in) {
        const floats low = widened(in) * scale, high = widened(in + lanes<float>) * scale;
        store(out, _mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    };
    int64_t i = 0;
    for (; i + step <= n; i += step) convert(to + i, from + i);
    if (i == n) return;
    bfloat16 tail[step];
    convert(tail, Some<step, int8_t>(from + i, n - i).values);
    __builtin_memcpy(to + i, tail, std::size_t(n - i) * sizeof(bfloat16));
}
#endif

int64_t dequantised(const Dequantised& a) {
    return with_half_or_float(a.dtype, [&](auto element) -> int64_t {
        parallel_for(a.N, a.N * a.K, a.num_threads, [&](int64_t n) {
            scale_row(static_cast<decltype(element)*>(a.out) + n * a.K, a.weight + n * a.weight_stride, a.scale[n], a.K);
        });
        return 0;
    });
}

#define FIELD(name) COGSYM_FIELD(Dequantised, name)
constexpr Field dequantised_fields[] = {FIELD(weight), FIELD(scale), FIELD(out),   FIELD(weight_stride),
                                        FIELD(N),      FIELD(K),     FIELD(dtype), FIELD(num_threads)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(linear) = {
    kernel<linear>("linear", "y, in float sums.", fields),
    kernel<dequantised>("dequantised", "A weight of 8-bit integers times the scales of its rows.", dequantised_fields),
    {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
