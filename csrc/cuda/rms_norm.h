// The CUDA kernels' door, as csrc/kernels.h is that of the CPU's.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace cogsym {
namespace cuda {

// y = x · r · (offset + weight) on `stream` of the current device; x and y are contiguous [rows, D]. float64 is not
// taken. Throws std::runtime_error where the launch fails.
void rms_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t D, float eps, float offset, DType dtype,
              DType weight_dtype, void* stream);

}  // namespace cuda
}  // namespace cogsym
