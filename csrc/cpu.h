// What this machine's processor has.
#pragma once

#include <string>
#include <vector>

namespace cogsym {

// Whether the processor and the operating system run what a variant was compiled with (flags: setup.py).
bool supports_baseline();
bool supports_avx2();
bool supports_avx512();
bool supports_avx512_bf16();
bool supports_amx_bf16();
bool supports_bf16();  // of Arm

// The vector and matrix extensions that matter to a language model, by their usual names.
std::vector<std::string> cpu_features();

}  // namespace cogsym
