// Linear cross-entropy: contract and formulas in cogsym/ops/linear_cross_entropy.py. The products are the library's;
// this is what happens to a block of logits between them, while it lies in cache.

#include <type_traits>

#include "vector.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

// One block of columns of the logits: `width` of them, from column `first` of the vocabulary on.
struct OnlineSoftmax {
    void* logits;            // [rows, width] contiguous; overwritten where `exponentials`
    const int64_t* targets;  // [rows]
    // Of the columns up to this block, of the compute type, [rows]: the largest product and the sum of exponentials.
    void* maximum;
    void* total;
    void* target_logit;  // written where the target lies in this block
    void* rescale;       // e^(maximum before - maximum after)
    void* logit_sum;     // or null: not wanted
    int64_t* argmax;     // or null: not wanted
    int64_t rows, width, first;
    double scale, soft_cap;  // 0: no soft cap
    bool exponentials;
    DType dtype;
    int num_threads;
};

struct AddRescaled {
    void* total;          // [rows, D] contiguous, of the compute type: total * rescale + product
    const void* product;  // [rows, D] contiguous
    const void* rescale;  // [rows] of the compute type
    int64_t rows, D;
    DType dtype;
    int num_threads;
};

struct LogitsGradient {
    void* logits;            // [rows, width] contiguous: overwritten by their gradient
    const int64_t* targets;  // [rows]
    const void* logsumexp;   // [rows] of the compute type
    const void* dloss;       // [rows] of the compute type
    int64_t rows, width, first;
    double scale, soft_cap;    // 0: no soft cap
    double confidence, floor;  // what the target and what every column has of the smoothed target
    DType dtype;
    int num_threads;
};

constexpr int64_t tile = 256;

template <class C>
struct Logit {
    C value, slope;  // slope: d value / d product
};

// value = scale z, rounded as a logsumexp is: what is left of a difference of large ones is no part of a product.
template <class C>
struct Linear {
    C scale;
    Logit<C> operator()(C z) const { return {rounded(scale * z), scale}; }
};

// value = cap tanh(scale z / cap). From e = exp(-2|u|): tanh |u| = (1 - e) / (1 + e), 1 - tanh² = 4e / (1 + e)², and
// near 0, where 1 - e cancels, the polynomial of Cephes' tanhf, good for float.
template <class C>
struct Capped {
    C scale, cap;
    Logit<C> operator()(C z) const {
        const C u = scale * z / cap, magnitude = u < 0 ? -u : u;
        const C e = exponential(C(-2) * magnitude), inverse = C(1) / (C(1) + e);
        return {cap * hyperbolic(u, magnitude, e, inverse), scale * C(4) * e * inverse * inverse};
    }
    static float hyperbolic(float u, float magnitude, float e, float inverse) {
        const float far = (1.0f - e) * inverse, square = u * u;
        float p = -5.70498872745e-3f;
        p = p * square + 2.06390887954e-2f;
        p = p * square - 5.37397155531e-2f;
        p = p * square + 1.33314422036e-1f;
        p = p * square - 3.33332819422e-1f;
        return magnitude < 0.625f ? p * square * u + u : (u < 0 ? -far : far);
    }
    static double hyperbolic(double u, double, double, double) { return __builtin_tanh(u); }
};

template <class C, class F>
void with_logit(double scale, double soft_cap, F f) {
    if (soft_cap == 0) return f(Linear<C>{C(scale)});
    f(Capped<C>{C(scale), C(soft_cap)});
}

// f(i, x), i = 0 or 1, for the vectors of a row in pairs; how many elements were in them.
template <class F>
inline int64_t for_vectors(const float* z, int64_t n, F f) {
    constexpr int64_t step = 2 * lanes<float>;
    int64_t i = 0;
    for (; i + step <= n; i += step) {
        f(0, load<floats>(z + i));
        f(1, load<floats>(z + i + lanes<float>));
    }
    return i;
}
template <class F>
inline int64_t for_vectors(const bfloat16* z, int64_t n, F f) {
    constexpr int64_t step = 2 * lanes<float>;
    int64_t i = 0;
    for (; i + step <= n; i += step) {
        const auto pairs = load<vector_t<uint32_t>>(z + i);
        f(0, (floats)(pairs << 16));
        f(1, (floats)(pairs & 0xffff0000u));
    }
    return i;
}

template <class T>
constexpr bool in_vectors = std::is_same<T, float>::value || std::is_same<T, bfloat16>::value;

template <class T, class C = compute_t<T>>
C largest_of(const T* z, int64_t n) {
    C result = -C(__builtin_inf());
    int64_t begin = 0;
    if constexpr (in_vectors<T>) {
        floats top[2] = {floats{} + result, floats{} + result};
        begin = for_vectors(z, n, [&](int i, floats x) { top[i] = x > top[i] ? x : top[i]; });
        result = largest<C>(top[0] > top[1] ? top[0] : top[1], result);
    }
#pragma omp simd reduction(max : result)
    for (int64_t i = begin; i < n; ++i) {
        const C x = widen(z[i]);
        result = x > result ? x : result;
    }
    return result;
}

// The sum of e^(scale (z - shift)) without storing the terms: for scoring, and for the loss without a gradient.
template <class T>
float sum_of_exponentials(const T* z, int64_t n, float shift, float scale) {
    floats sums[2] = {};
    const float exponent = float(double(scale) * 1.4426950408889634);
    const int64_t begin =
        for_vectors(z, n, [&](int i, floats x) { sums[i] += exponential2((x - shift) * exponent); });
    float result = sum_of<float>(sums[0] + sums[1]);
    for (int64_t i = begin; i < n; ++i) result += exponential((widen(z[i]) - shift) * scale);
    return result;
}

// exponentials[i] = e^(logit - shift) · slope; returns the sum of e^(logit - shift). Apart from the loop over rows, for
// the compiler's sake: within it, with bfloat16's conversions beside, it is not vectorised.
template <class T, class Value, class C = compute_t<T>>
__attribute__((noinline)) C exponentiate(const T* __restrict z, int64_t n, C shift, Value value,
                                         C* __restrict exponentials) {
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
        const Logit<C> logit = value(widen(z[i]));
        const C e = exponential(logit.value - shift);
        sum += e;
        exponentials[i] = e * logit.slope;
    }
    return sum;
}

// Logits grow with the product (scale > 0), so the products' maximum is theirs, ties included.
template <class T, class Value>
void forward(const OnlineSoftmax& a, Value value) {
    using C = compute_t<T>;
    parallel_for(a.rows, a.rows * a.width, a.num_threads, [&](int64_t row) {
        T* z = static_cast<T*>(a.logits) + row * a.width;
        C& maximum = static_cast<C*>(a.maximum)[row];
        C& total = static_cast<C*>(a.total)[row];

        const C block_maximum = largest_of(z, a.width);
        C rescale = 1;
        if (block_maximum > maximum) {  // seldom, once a few blocks are seen: a scan for the place costs nothing
            rescale = exponential(value(maximum).value - value(block_maximum).value);
            maximum = block_maximum;
            if (a.argmax) {
                int64_t i = 0;
                while (widen(z[i]) != block_maximum) ++i;
                a.argmax[row] = a.first + i;
            }
        }
        static_cast<C*>(a.rescale)[row] = rescale;

        const int64_t target = a.targets[row] - a.first;
        const bool here = target >= 0 && target < a.width;
        if (here) static_cast<C*>(a.target_logit)[row] = value(widen(z[target])).value;

        // Where all are -inf so far, any finite shift makes the exponentials 0.
        C shift = value(maximum).value;
        if (shift == -C(__builtin_inf())) shift = 0;
        if constexpr (in_vectors<T> && std::is_same<Value, Linear<C>>::value)
            if (!a.exponentials && !a.logit_sum) {
                const C largest = maximum == -C(__builtin_inf()) ? C(0) : maximum;
                total = total * rescale + sum_of_exponentials(z, a.width, largest, value.scale);
                return;
            }
        C sum = 0, logit_sum = 0;
        C exponentials[tile];
        for (int64_t begin = 0; begin < a.width; begin += tile) {
            const int64_t n = a.width - begin < tile ? a.width - begin : tile;
            T* out = z + begin;
            sum += exponentiate(out, n, shift, value, exponentials);
            if (a.logit_sum) {
                C part = 0;
#pragma omp simd reduction(+ : part)
                for (int64_t i = 0; i < n; ++i) part += value(widen(out[i])).value;
                logit_sum += part;
            }
            if (a.exponentials) write(out, n, [&](int64_t i) { return exponentials[i]; });
        }
        total = total * rescale + sum;
        if (a.logit_sum) static_cast<C*>(a.logit_sum)[row] += logit_sum;
        if (a.exponentials && here) z[target] = narrow<T>(C(0));
    });
}

template <class T>
void add(const AddRescaled& a) {
    using C = compute_t<T>;
    parallel_for(a.rows, a.rows * a.D, a.num_threads, [&](int64_t row) {
        C* total = static_cast<C*>(a.total) + row * a.D;
        const T* product = static_cast<const T*>(a.product) + row * a.D;
        const C rescale = static_cast<const C*>(a.rescale)[row];
#pragma omp simd
        for (int64_t i = 0; i < a.D; ++i) total[i] = total[i] * rescale + widen(product[i]);
    });
}

template <class T, class Value>
void backward(const LogitsGradient& a, Value value) {
    using C = compute_t<T>;
    parallel_for(a.rows, a.rows * a.width, a.num_threads, [&](int64_t row) {
        T* z = static_cast<T*>(a.logits) + row * a.width;
        const C logsumexp = static_cast<const C*>(a.logsumexp)[row], dloss = static_cast<const C*>(a.dloss)[row];
        const C floor = C(a.floor);
        const auto gradient = [=](C product, C wanted) {
            const Logit<C> logit = value(product);
            return dloss * logit.slope * (exponential(logit.value - logsumexp) - wanted);
        };
        const int64_t target = a.targets[row] - a.first;
        const bool here = target >= 0 && target < a.width;
        const C of_target = here ? gradient(widen(z[target]), floor + C(a.confidence)) : C(0);
        write(z, a.width, [=](int64_t i) { return gradient(widen(z[i]), floor); });
        if (here) z[target] = narrow<T>(of_target);
    });
}

void online_softmax(const OnlineSoftmax& a) {
    with_type(a.dtype, [&](auto element) {
        using T = decltype(element);
        with_logit<compute_t<T>>(a.scale, a.soft_cap, [&](auto value) { forward<T>(a, value); });
    });
}

void add_rescaled(const AddRescaled& a) {
    with_type(a.dtype, [&](auto element) { add<decltype(element)>(a); });
}

void logits_gradient(const LogitsGradient& a) {
    with_type(a.dtype, [&](auto element) {
        using T = decltype(element);
        with_logit<compute_t<T>>(a.scale, a.soft_cap, [&](auto value) { backward<T>(a, value); });
    });
}

#define FIELD(name) COGSYM_FIELD(OnlineSoftmax, name)
constexpr Field softmax_fields[] = {
    FIELD(logits), FIELD(targets), FIELD(maximum), FIELD(total), FIELD(target_logit), FIELD(rescale), FIELD(logit_sum),
    FIELD(argmax), FIELD(rows), FIELD(width), FIELD(first), FIELD(scale), FIELD(soft_cap), FIELD(exponentials),
    FIELD(dtype), FIELD(num_threads)};
#undef FIELD
#define FIELD(name) COGSYM_FIELD(AddRescaled, name)
constexpr Field add_fields[] = {FIELD(total), FIELD(product), FIELD(rescale),    FIELD(rows),
                                FIELD(D),     FIELD(dtype),   FIELD(num_threads)};
#undef FIELD
#define FIELD(name) COGSYM_FIELD(LogitsGradient, name)
constexpr Field gradient_fields[] = {
    FIELD(logits), FIELD(targets), FIELD(logsumexp), FIELD(dloss), FIELD(rows), FIELD(width), FIELD(first),
    FIELD(scale), FIELD(soft_cap), FIELD(confidence), FIELD(floor), FIELD(dtype), FIELD(num_threads)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(linear_cross_entropy) = {
    kernel<online_softmax>("online_softmax",
                           "One block of columns into the running statistics, and its exponentials in its place.",
                           softmax_fields),
    kernel<add_rescaled>("add_rescaled", "total = total * rescale + product.", add_fields),
    kernel<logits_gradient>("logits_gradient", "The gradient of a block of logits, in its place.", gradient_fields),
    {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
