// Root-mean-square norm on an NVIDIA GPU: contract in cogsym/ops/rms_norm.py. One block of threads takes one row.
//
// CUDA tensors are served by Triton. This kernel is there to be measured against it on short inputs, where Triton's
// launch costs more than the work, and nothing is dispatched to it until such a measurement says so.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "rms_norm.h"

namespace cogsym {
namespace cuda {
namespace {

constexpr int max_threads = 1024;
constexpr int warp = 32;

__device__ float sum_over_block(float value) {
    __shared__ float partial[max_threads / warp];
    for (int lane = warp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    if (threadIdx.x % warp == 0) partial[threadIdx.x / warp] = value;
    __syncthreads();
    float total = 0.0f;
    for (unsigned i = 0; i < blockDim.x / warp; ++i) total += partial[i];
    return total;
}

template <class T, class W>
__global__ void rms_norm_kernel(const T* x, const W* weight, T* y, int64_t D, float eps, float offset) {
    const T* row = x + blockIdx.x * D;
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x) {
        const float value = float(row[i]);
        squares += value * value;
    }
    const float r = rsqrtf(sum_over_block(squares) / float(D) + eps);
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x)
        y[blockIdx.x * D + i] = T(float(row[i]) * r * (offset + float(weight[i])));
}

template <class F>
void with_type(DType dtype, F f) {
    switch (dtype) {
        case DType::float32: return f(float{});
        case DType::bfloat16: return f(__nv_bfloat16{});
        case DType::float16: return f(__half{});
        case DType::float64: throw std::runtime_error("rms_norm_cuda: float64 is not supported");
    }
}

}  // namespace

void rms_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t D, float eps, float offset, DType dtype,
              DType weight_dtype, void* stream) {
    if (rows == 0 || D == 0) return;
    const int64_t rounded = (D + warp - 1) / warp * warp;
    const unsigned threads = unsigned(rounded < max_threads ? rounded : max_threads);
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        with_type(weight_dtype, [&](auto weight_element) {
            using W = decltype(weight_element);
            rms_norm_kernel<T, W><<<unsigned(rows), threads, 0, static_cast<cudaStream_t>(stream)>>>(
                static_cast<const T*>(x), static_cast<const W*>(weight), static_cast<T*>(y), D, eps, offset);
        });
    });
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) throw std::runtime_error(std::string("rms_norm_cuda: ") + cudaGetErrorString(status));
}

}  // namespace cuda
}  // namespace cogsym
