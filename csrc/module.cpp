// cogsym._C: the CPU kernels for Python. Tensors arrive as addresses, shapes and strides in elements, so that one build
// serves every version of torch; cogsym/ops/cpp.py checks them, and nothing else should call this.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#ifdef COGSYM_CUDA
#include "cuda/rms_norm.h"
#endif

namespace py = pybind11;

namespace cogsym {
namespace {

using Address = std::uintptr_t;

struct Variant {
    const char* name;
    bool (*supported)();
    decltype(&baseline::rms_norm) rms_norm;
    decltype(&baseline::rms_norm_backward) rms_norm_backward;
    decltype(&baseline::rotary) rotary;
    decltype(&baseline::gated_activation) gated_activation;
    decltype(&baseline::gated_activation_backward) gated_activation_backward;
    decltype(&baseline::attention) attention;
    decltype(&baseline::attention_backward) attention_backward;
    decltype(&baseline::decode_attention) decode_attention;
    decltype(&baseline::online_softmax) online_softmax;
    decltype(&baseline::token_scores) token_scores;
    decltype(&baseline::add_rescaled) add_rescaled;
    decltype(&baseline::logits_gradient) logits_gradient;
};

#define COGSYM_ENTRY(isa)                        \
    {#isa,                                       \
     supports_##isa,                             \
     isa::rms_norm,                              \
     isa::rms_norm_backward,                     \
     isa::rotary,                                \
     isa::gated_activation,                      \
     isa::gated_activation_backward,             \
     isa::attention,                             \
     isa::attention_backward,                    \
     isa::decode_attention,                      \
     isa::online_softmax,                        \
     isa::token_scores,                          \
     isa::add_rescaled,                          \
     isa::logits_gradient},
const Variant variants[] = {COGSYM_VARIANTS(COGSYM_ENTRY)};  // from the slowest to the fastest

const Variant* fastest() {
    const Variant* best = variants;
    for (const Variant& v : variants)
        if (v.supported()) best = &v;
    return best;
}

const Variant* active = fastest();

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Variant& v : variants)
        if (v.supported()) names.push_back(v.name);
    return names;
}

void set_isa(const std::string& name) {
    for (const Variant& v : variants)
        if (name == v.name && v.supported()) {
            active = &v;
            return;
        }
    throw std::invalid_argument("the extension has no variant '" + name + "' that this processor runs");
}

void* pointer(Address a) { return reinterpret_cast<void*>(a); }

DType dtype_of(int code) {
    if (code < 0 || code > int(DType::float64)) throw std::invalid_argument("unknown dtype code");
    return DType(code);
}

Activation activation_of(int code) {
    if (code < 0 || code > int(Activation::gelu_tanh)) throw std::invalid_argument("unknown activation code");
    return Activation(code);
}

// Room for `count` values of the type that `dtype` is computed in.
class Scratch {
  public:
    Scratch(DType dtype, int64_t count)
        : data_(::operator new(std::size_t(count) * (dtype == DType::float64 ? 8 : 4), std::align_val_t(64))) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* data() const { return data_; }

  private:
    void* data_;
};

void rms_norm(Address x, int64_t x_stride, Address residual, int64_t residual_stride, Address weight, Address y,
              Address h, int64_t rows, int64_t D, double eps, double offset, int dtype, int weight_dtype,
              int num_threads) {
    RmsNorm a{};
    a.dtype = dtype_of(dtype), a.weight_dtype = dtype_of(weight_dtype);
    a.x = pointer(x), a.x_stride = x_stride;
    a.residual = pointer(residual), a.residual_stride = residual_stride;
    a.weight = pointer(weight), a.y = pointer(y), a.h = pointer(h);
    a.rows = rows, a.D = D, a.eps = eps, a.offset = offset, a.num_threads = num_threads;
    const Scratch gamma(a.dtype, D);
    a.gamma = gamma.data();
    active->rms_norm(a);
}

void rms_norm_backward(Address dy, int64_t dy_stride, Address h, int64_t h_stride, Address dh, int64_t dh_stride,
                       Address weight, Address dx, Address dweight, int64_t rows, int64_t D, double eps, double offset,
                       int dtype, int weight_dtype, int num_threads) {
    RmsNormBackward a{};
    a.dtype = dtype_of(dtype), a.weight_dtype = dtype_of(weight_dtype);
    a.dy = pointer(dy), a.dy_stride = dy_stride;
    a.h = pointer(h), a.h_stride = h_stride;
    a.dh = pointer(dh), a.dh_stride = dh_stride;
    a.weight = pointer(weight), a.dx = pointer(dx), a.dweight = pointer(dweight);
    a.rows = rows, a.D = D, a.eps = eps, a.offset = offset, a.num_threads = num_threads;
    // dweight is summed over blocks of rows: short ones, for its precision, but at most 512, for the scratch's size.
    const int64_t even = (rows + 511) / 512;
    a.block_rows = even > 16 ? even : 16;
    a.num_blocks = (rows + a.block_rows - 1) / a.block_rows;
    const Scratch gamma(a.dtype, D), partials(a.dtype, dweight ? a.num_blocks * D : 0);
    a.gamma = gamma.data(), a.partials = partials.data();
    active->rms_norm_backward(a);
}

void rotary(Address x, std::tuple<int64_t, int64_t, int64_t> x_strides, Address cos,
            std::tuple<int64_t, int64_t> cos_strides, Address sin, std::tuple<int64_t, int64_t> sin_strides, Address y,
            int64_t B, int64_t T, int64_t H, int64_t D, int64_t half, bool interleaved, bool inverse, int dtype,
            int table_dtype, int num_threads) {
    Rotary a{};
    a.dtype = dtype_of(dtype), a.table_dtype = dtype_of(table_dtype);
    a.x = pointer(x), a.cos = pointer(cos), a.sin = pointer(sin), a.y = pointer(y);
    std::tie(a.x_strides[0], a.x_strides[1], a.x_strides[2]) = x_strides;
    std::tie(a.cos_strides[0], a.cos_strides[1]) = cos_strides;
    std::tie(a.sin_strides[0], a.sin_strides[1]) = sin_strides;
    a.B = B, a.T = T, a.H = H, a.D = D, a.half = half;
    a.interleaved = interleaved, a.inverse = inverse, a.num_threads = num_threads;
    active->rotary(a);
}

void gated_activation(Address gate, int64_t gate_stride, Address up, int64_t up_stride, Address z, int64_t rows,
                      int64_t F, int activation, int dtype, int num_threads) {
    GatedActivation a{};
    a.dtype = dtype_of(dtype), a.activation = activation_of(activation);
    a.gate = pointer(gate), a.gate_stride = gate_stride;
    a.up = pointer(up), a.up_stride = up_stride;
    a.z = pointer(z), a.rows = rows, a.F = F, a.num_threads = num_threads;
    active->gated_activation(a);
}

void gated_activation_backward(Address dz, int64_t dz_stride, Address gate, int64_t gate_stride, Address up,
                               int64_t up_stride, Address dgate, Address dup, int64_t gradient_stride, int64_t rows,
                               int64_t F, int activation, int dtype, int num_threads) {
    GatedActivationBackward a{};
    a.dtype = dtype_of(dtype), a.activation = activation_of(activation);
    a.dz = pointer(dz), a.dz_stride = dz_stride;
    a.gate = pointer(gate), a.gate_stride = gate_stride;
    a.up = pointer(up), a.up_stride = up_stride;
    a.dgate = pointer(dgate), a.dup = pointer(dup), a.gradient_stride = gradient_stride;
    a.rows = rows, a.F = F, a.num_threads = num_threads;
    active->gated_activation_backward(a);
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;

void set(int64_t (&to)[3], const Strides& strides) { std::tie(to[0], to[1], to[2]) = strides; }

void set(AttentionInputs& a, Address q, const Strides& q_strides, Address k, const Strides& k_strides, Address v,
         const Strides& v_strides, Address starts, std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> shape,
         double scale, int64_t window, double soft_cap, int dtype, int num_threads) {
    a.dtype = dtype_of(dtype);
    a.q = pointer(q), a.k = pointer(k), a.v = pointer(v), a.starts = static_cast<const int32_t*>(pointer(starts));
    set(a.q_strides, q_strides), set(a.k_strides, k_strides), set(a.v_strides, v_strides);
    std::tie(a.B, a.T, a.H, a.KV, a.D) = shape;
    a.scale = scale, a.window = window, a.soft_cap = soft_cap, a.num_threads = num_threads;
}

template <class Arguments>
void run_with_scratch(int64_t (*kernel)(const Arguments&), Arguments& a) {
    // The C library returns blocks of more than 32 MiB to the system at once, and getting their pages anew costs a
    // third of the time at a few thousand tokens. So a thread keeps one, up to a size beyond which they matter less.
    constexpr int64_t most_kept = 64 << 20;
    static thread_local std::unique_ptr<Scratch> kept;
    static thread_local int64_t kept_bytes = 0;
    const int64_t bytes = kernel(a);
    std::unique_ptr<Scratch> large;
    if (bytes > most_kept) {
        large = std::make_unique<Scratch>(DType::float32, (bytes + 3) / 4);
    } else if (bytes > kept_bytes) {
        kept_bytes = 0;
        kept = std::make_unique<Scratch>(DType::float32, (bytes + 3) / 4);
        kept_bytes = bytes;
    }
    a.scratch = (large ? large : kept)->data();
    kernel(a);
}

void attention(Address q, const Strides& q_strides, Address k, const Strides& k_strides, Address v,
               const Strides& v_strides, Address starts,
               const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& shape, double scale, int64_t window,
               double soft_cap, int dtype, int num_threads, Address o, Address lse) {
    Attention a{};
    set(a, q, q_strides, k, k_strides, v, v_strides, starts, shape, scale, window, soft_cap, dtype, num_threads);
    a.o = pointer(o), a.lse = pointer(lse);
    run_with_scratch(active->attention, a);
}

void attention_backward(Address q, const Strides& q_strides, Address k, const Strides& k_strides, Address v,
                        const Strides& v_strides, Address starts,
                        const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& shape, double scale,
                        int64_t window, double soft_cap, int dtype, int num_threads, Address dout,
                        const Strides& dout_strides, Address o, Address lse, Address dq, Address dk, Address dv) {
    AttentionBackward a{};
    set(a, q, q_strides, k, k_strides, v, v_strides, starts, shape, scale, window, soft_cap, dtype, num_threads);
    a.dout = pointer(dout), a.o = pointer(o), a.lse = pointer(lse);
    set(a.dout_strides, dout_strides);
    a.dq = pointer(dq), a.dk = pointer(dk), a.dv = pointer(dv);
    run_with_scratch(active->attention_backward, a);
}

using Pair = std::tuple<int64_t, int64_t>;

void decode_attention(Address q, const Pair& q_strides, Address k, const Pair& k_strides, Address v,
                      const Pair& v_strides, Address begins, Address ends,
                      const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& shape, double scale,
                      double soft_cap, int dtype, int num_threads, Address o) {
    DecodeAttention a{};
    a.dtype = dtype_of(dtype);
    a.q = pointer(q), a.k = pointer(k), a.v = pointer(v), a.o = pointer(o);
    a.begins = static_cast<const int64_t*>(pointer(begins)), a.ends = static_cast<const int64_t*>(pointer(ends));
    std::tie(a.q_strides[0], a.q_strides[1]) = q_strides;
    std::tie(a.k_strides[0], a.k_strides[1]) = k_strides;
    std::tie(a.v_strides[0], a.v_strides[1]) = v_strides;
    std::tie(a.N, a.M, a.H, a.KV, a.D) = shape;
    a.scale = scale, a.soft_cap = soft_cap, a.num_threads = num_threads;
    run_with_scratch(active->decode_attention, a);
}

void online_softmax(Address logits, Address targets, Address maximum, Address total, Address target_logit,
                    Address rescale, Address logit_sum, Address argmax, int64_t rows, int64_t width, int64_t first,
                    double scale, double soft_cap, bool exponentials, int dtype, int num_threads) {
    OnlineSoftmax a{};
    a.dtype = dtype_of(dtype), a.logits = pointer(logits);
    a.targets = static_cast<const int64_t*>(pointer(targets));
    a.maximum = pointer(maximum), a.total = pointer(total), a.target_logit = pointer(target_logit);
    a.rescale = pointer(rescale), a.logit_sum = pointer(logit_sum);
    a.argmax = static_cast<int64_t*>(pointer(argmax));
    a.rows = rows, a.width = width, a.first = first;
    a.scale = scale, a.soft_cap = soft_cap, a.exponentials = exponentials, a.num_threads = num_threads;
    active->online_softmax(a);
}

bool token_scores(Address hidden, int64_t hidden_stride, Address weight, int64_t weight_stride, Address targets,
                  Address maximum, Address total, Address target_logit, Address argmax,
                  const std::tuple<int64_t, int64_t, int64_t>& shape, double scale, int num_threads) {
    TokenScores a{};
    a.hidden = pointer(hidden), a.hidden_stride = hidden_stride;
    a.weight = pointer(weight), a.weight_stride = weight_stride;
    a.targets = static_cast<const int64_t*>(pointer(targets));
    a.maximum = static_cast<float*>(pointer(maximum)), a.total = static_cast<float*>(pointer(total));
    a.target_logit = static_cast<float*>(pointer(target_logit));
    a.argmax = static_cast<int64_t*>(pointer(argmax));
    std::tie(a.N, a.V, a.D) = shape;
    a.scale = scale, a.num_threads = num_threads;
    if (active->token_scores(a) < 0) return false;
    run_with_scratch(active->token_scores, a);
    return true;
}

void add_rescaled(Address total, Address product, Address rescale, int64_t rows, int64_t D, int dtype,
                  int num_threads) {
    AddRescaled a{};
    a.dtype = dtype_of(dtype), a.total = pointer(total), a.product = pointer(product), a.rescale = pointer(rescale);
    a.rows = rows, a.D = D, a.num_threads = num_threads;
    active->add_rescaled(a);
}

void logits_gradient(Address logits, Address targets, Address logsumexp, Address dloss, int64_t rows, int64_t width,
                     int64_t first, double scale, double soft_cap, double confidence, double floor, int dtype,
                     int num_threads) {
    LogitsGradient a{};
    a.dtype = dtype_of(dtype), a.logits = pointer(logits);
    a.targets = static_cast<const int64_t*>(pointer(targets));
    a.logsumexp = pointer(logsumexp), a.dloss = pointer(dloss);
    a.rows = rows, a.width = width, a.first = first;
    a.scale = scale, a.soft_cap = soft_cap, a.confidence = confidence, a.floor = floor, a.num_threads = num_threads;
    active->logits_gradient(a);
}

}  // namespace
}  // namespace cogsym

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    using namespace cogsym;
    using py::arg;
    const py::call_guard<py::gil_scoped_release> no_gil;

    m.doc() = "CPU kernels of cogsym, called through cogsym.ops.cpp with addresses, shapes and strides in elements.";
    m.attr("DTYPES") = py::make_tuple("float32", "bfloat16", "float16", "float64");  // place: the dtype code
    m.attr("ACTIVATIONS") = py::make_tuple("silu", "gelu_tanh");                     // place: the activation code
#ifdef _OPENMP
    m.attr("OPENMP") = true;
#else
    m.attr("OPENMP") = false;
#endif
    m.def("cpu_features", &cpu_features, "Vector and matrix extensions that this processor has.");
    m.def("isas", &isas, "Variants of the kernels that this processor runs, from the slowest to the fastest.");
    m.def("isa", [] { return active->name; }, "The variant in use.");
    m.def("set_isa", &set_isa, arg("name"), "Use another variant; ValueError where this processor cannot run it.");

    m.def("rms_norm", &rms_norm, no_gil, arg("x"), arg("x_stride"), arg("residual"), arg("residual_stride"),
          arg("weight"), arg("y"), arg("h"), arg("rows"), arg("D"), arg("eps"), arg("offset"), arg("dtype"),
          arg("weight_dtype"), arg("num_threads"), "y (and h = x + residual where residual is not 0).");
    m.def("rms_norm_backward", &rms_norm_backward, no_gil, arg("dy"), arg("dy_stride"), arg("h"), arg("h_stride"),
          arg("dh"), arg("dh_stride"), arg("weight"), arg("dx"), arg("dweight"), arg("rows"), arg("D"), arg("eps"),
          arg("offset"), arg("dtype"), arg("weight_dtype"), arg("num_threads"),
          "dx and dweight, each unless its address is 0.");
    m.def("rotary", &rotary, no_gil, arg("x"), arg("x_strides"), arg("cos"), arg("cos_strides"), arg("sin"),
          arg("sin_strides"), arg("y"), arg("B"), arg("T"), arg("H"), arg("D"), arg("half"), arg("interleaved"),
          arg("inverse"), arg("dtype"), arg("table_dtype"), arg("num_threads"), "y, x turned.");
    m.def("gated_activation", &gated_activation, no_gil, arg("gate"), arg("gate_stride"), arg("up"), arg("up_stride"),
          arg("z"), arg("rows"), arg("F"), arg("activation"), arg("dtype"), arg("num_threads"), "z = act(gate) * up.");
    m.def("gated_activation_backward", &gated_activation_backward, no_gil, arg("dz"), arg("dz_stride"), arg("gate"),
          arg("gate_stride"), arg("up"), arg("up_stride"), arg("dgate"), arg("dup"), arg("gradient_stride"), arg("rows"),
          arg("F"), arg("activation"), arg("dtype"), arg("num_threads"), "dgate and dup, each unless its address is 0.");
    m.def("attention", &attention, no_gil, arg("q"), arg("q_strides"), arg("k"), arg("k_strides"), arg("v"),
          arg("v_strides"), arg("starts"), arg("shape"), arg("scale"), arg("window"), arg("soft_cap"), arg("dtype"),
          arg("num_threads"), arg("o"), arg("lse"), "o and lse; shape is (B, T, H, KV, D).");
    m.def("attention_backward", &attention_backward, no_gil, arg("q"), arg("q_strides"), arg("k"), arg("k_strides"),
          arg("v"), arg("v_strides"), arg("starts"), arg("shape"), arg("scale"), arg("window"), arg("soft_cap"),
          arg("dtype"), arg("num_threads"), arg("dout"), arg("dout_strides"), arg("o"), arg("lse"), arg("dq"),
          arg("dk"), arg("dv"), "dq, dk and dv, each unless its address is 0.");
    m.def("decode_attention", &decode_attention, no_gil, arg("q"), arg("q_strides"), arg("k"), arg("k_strides"),
          arg("v"), arg("v_strides"), arg("begins"), arg("ends"), arg("shape"), arg("scale"), arg("soft_cap"),
          arg("dtype"), arg("num_threads"), arg("o"), "o; shape is (N, M, H, KV, D).");
    m.def("online_softmax", &online_softmax, no_gil, arg("logits"), arg("targets"), arg("maximum"), arg("total"),
          arg("target_logit"), arg("rescale"), arg("logit_sum"), arg("argmax"), arg("rows"), arg("width"),
          arg("first"), arg("scale"), arg("soft_cap"), arg("exponentials"), arg("dtype"), arg("num_threads"),
          "One block of columns into the running statistics, and its exponentials in its place.");
    m.def("token_scores", &token_scores, no_gil, arg("hidden"), arg("hidden_stride"), arg("weight"),
          arg("weight_stride"), arg("targets"), arg("maximum"), arg("total"), arg("target_logit"), arg("argmax"),
          arg("shape"), arg("scale"), arg("num_threads"),
          "All columns at once, in bfloat16; shape is (N, V, D). False where this processor has no instruction for it.");
    m.def("add_rescaled", &add_rescaled, no_gil, arg("total"), arg("product"), arg("rescale"), arg("rows"), arg("D"),
          arg("dtype"), arg("num_threads"), "total = total * rescale + product.");
    m.def("logits_gradient", &logits_gradient, no_gil, arg("logits"), arg("targets"), arg("logsumexp"), arg("dloss"),
          arg("rows"), arg("width"), arg("first"), arg("scale"), arg("soft_cap"), arg("confidence"), arg("floor"),
          arg("dtype"), arg("num_threads"), "The gradient of a block of logits, in its place.");
#ifdef COGSYM_CUDA
    m.def(
        "rms_norm_cuda",
        [](Address x, Address weight, Address y, int64_t rows, int64_t D, double eps, double offset, int dtype,
           int weight_dtype, Address stream) {
            cuda::rms_norm(pointer(x), pointer(weight), pointer(y), rows, D, float(eps), float(offset), dtype_of(dtype),
                           dtype_of(weight_dtype), pointer(stream));
        },
        no_gil, arg("x"), arg("weight"), arg("y"), arg("rows"), arg("D"), arg("eps"), arg("offset"), arg("dtype"),
        arg("weight_dtype"), arg("stream"), "y, for contiguous tensors on the current CUDA device.");
#endif
}
