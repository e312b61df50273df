// The door between module.cpp and the kernels: addresses, shapes and strides (in elements). No Python, no torch.
//
// Each kernel file is compiled once for every instruction set in COGSYM_VARIANTS, inside a namespace of that name, and
// module.cpp picks a table of them at run time. So a kernel file must not instantiate templates or inline functions
// of the standard library: the linker would keep one copy, perhaps the one with AVX-512 in it, for every caller.
#pragma once

#include <cstdint>

namespace cogsym {

enum class DType : int { float32, bfloat16, float16, float64 };
enum class Activation : int { silu, gelu_tanh };

// Element type of the tensors named by void*; all of them contiguous in the last dimension.
struct RmsNorm {
    DType dtype, weight_dtype;
    const void* x;         // [rows, D]
    const void* residual;  // [rows, D], or null: then h is x and is not written
    const void* weight;    // [D]
    void* h;               // [rows, D] contiguous: x + residual
    void* y;               // [rows, D] contiguous
    int64_t rows, D, x_stride, residual_stride;
    double eps, offset;
    void* gamma;  // scratch, [D] of the compute type
    int num_threads;
};

struct RmsNormBackward {
    DType dtype, weight_dtype;
    const void* dy;      // [rows, D]
    const void* h;       // [rows, D]
    const void* dh;      // [rows, D], added to dx, or null
    const void* weight;  // [D]
    void* dx;            // [rows, D] contiguous, or null: not wanted
    void* dweight;       // [D], or null: not wanted
    int64_t rows, D, dy_stride, h_stride, dh_stride;
    double eps, offset;
    void* gamma;     // scratch, [D] of the compute type
    void* partials;  // scratch, [num_blocks, D] of the compute type where dweight is wanted
    int64_t block_rows, num_blocks;
    int num_threads;
};

struct Rotary {
    DType dtype, table_dtype;
    const void* x;    // [B, T, H, D]
    const void* cos;  // [B or 1, T, half]; a batch stride of 0 shares it
    const void* sin;
    void* y;  // [B, T, H, D] contiguous
    int64_t B, T, H, D, half;
    int64_t x_strides[3], cos_strides[2], sin_strides[2];
    bool interleaved, inverse;
    int num_threads;
};

struct GatedActivation {
    DType dtype;
    Activation activation;
    const void* gate;  // [rows, F]
    const void* up;    // [rows, F]
    void* z;           // [rows, F] contiguous
    int64_t rows, F, gate_stride, up_stride;
    int num_threads;
};

struct GatedActivationBackward {
    DType dtype;
    Activation activation;
    const void* dz;    // [rows, F]
    const void* gate;  // [rows, F]
    const void* up;    // [rows, F]
    void* dgate;       // [rows, F], or null: not wanted
    void* dup;         // [rows, F], or null: not wanted
    int64_t rows, F, dz_stride, gate_stride, up_stride, gradient_stride;
    int num_threads;
};

// A last dimension is contiguous; strides are those of the others. Nothing is copied for grouped heads.
struct AttentionInputs {
    DType dtype;
    const void* q;          // [B, T, H, D]
    const void* k;          // [B, T, KV, D]
    const void* v;          // [B, T, KV, D]
    const int32_t* starts;  // [B, T] contiguous: the first key that each query sees, or null: 0
    int64_t B, T, H, KV, D;
    int64_t q_strides[3], k_strides[3], v_strides[3];
    double scale, soft_cap;  // a soft cap of 0 is none
    int64_t window;          // 0 is none
    void* scratch;           // as many bytes as a call with null, which does nothing else, returns
    int num_threads;
};

struct Attention : AttentionInputs {
    void* o;    // [B, T, H, D] contiguous
    void* lse;  // [B, H, T] contiguous, of the compute type
};

struct AttentionBackward : AttentionInputs {
    const void* dout;  // [B, T, H, D]
    int64_t dout_strides[3];
    const void* o;          // [B, T, H, D] contiguous
    const void* lse;        // [B, H, T] contiguous, of the compute type
    void *dq, *dk, *dv;     // as q, k and v, contiguous; each null where it is not wanted
};

// A last dimension is contiguous; strides are those of the others.
struct DecodeAttention {
    DType dtype;
    const void* q;          // [N, H, D]
    const void* k;          // [S, KV, D]
    const void* v;          // [S, KV, D]
    const int64_t* begins;  // [N, M] contiguous
    const int64_t* ends;    // [N, M] contiguous
    void* o;                // [N, H, D] contiguous
    int64_t N, M, H, KV, D;
    int64_t q_strides[2], k_strides[2], v_strides[2];
    double scale, soft_cap;  // a soft cap of 0 is none
    void* scratch;           // as for attention
    int num_threads;
};

// One block of columns of the logits: `width` of them, from column `first` of the vocabulary on.
struct OnlineSoftmax {
    DType dtype;
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
    int num_threads;
};

// All columns of the logits of bfloat16 tokens; statistics as above, the target's logit and the largest's place besides.
struct TokenScores {
    const void* hidden;      // [N, D]
    const void* weight;      // [V, D]
    const int64_t* targets;  // [N]
    float *maximum, *total, *target_logit;  // [N]
    int64_t* argmax;                        // [N]
    int64_t N, V, D, hidden_stride, weight_stride;
    double scale;
    void* scratch;  // as for attention
    int num_threads;
};

struct AddRescaled {
    DType dtype;
    void* total;          // [rows, D] contiguous, of the compute type: total * rescale + product
    const void* product;  // [rows, D] contiguous
    const void* rescale;  // [rows] of the compute type
    int64_t rows, D;
    int num_threads;
};

struct LogitsGradient {
    DType dtype;
    void* logits;            // [rows, width] contiguous: overwritten by their gradient
    const int64_t* targets;  // [rows]
    const void* logsumexp;   // [rows] of the compute type
    const void* dloss;       // [rows] of the compute type
    int64_t rows, width, first;
    double scale, soft_cap;  // 0: no soft cap
    double confidence, floor;  // what the target and what every column has of the smoothed target
    int num_threads;
};

// COGSYM_VARIANTS(V) is V(baseline) V(avx2) ..., from setup.py.
#define COGSYM_DECLARE(isa)                                         \
    namespace isa {                                                 \
    void rms_norm(const RmsNorm&);                                  \
    void rms_norm_backward(const RmsNormBackward&);                 \
    void rotary(const Rotary&);                                     \
    void gated_activation(const GatedActivation&);                  \
    void gated_activation_backward(const GatedActivationBackward&); \
    int64_t attention(const Attention&);                            \
    int64_t attention_backward(const AttentionBackward&);           \
    int64_t decode_attention(const DecodeAttention&);               \
    void online_softmax(const OnlineSoftmax&);                      \
    int64_t token_scores(const TokenScores&);                       \
    void add_rescaled(const AddRescaled&);                          \
    void logits_gradient(const LogitsGradient&);                    \
    }
COGSYM_VARIANTS(COGSYM_DECLARE)
#undef COGSYM_DECLARE

}  // namespace cogsym
