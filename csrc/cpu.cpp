#include "cpu.h"

#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace cogsym {

bool supports_baseline() { return true; }

#if defined(__x86_64__)

bool supports_avx2() {
    // Every processor with AVX2 and FMA converts float16 too (F16C), which older compilers cannot ask for.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool supports_avx512() {
    return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool supports_avx512_bf16() { return supports_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool supports_amx_bf16() {
#if defined(__linux__)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    const bool tiles = edx >> 24 & 1, products = (edx >> 22 & 1) && (edx >> 25 & 1);  // of bfloat16, and of 8 bits
    if (!supports_avx512_bf16() || !tiles || !products) return false;
    // Tiles are 8 KiB of state that Linux saves only for a process that has asked for them (Linux 5.16).
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

std::vector<std::string> cpu_features() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    const bool avx512_fp16 = supports_avx512() && (edx >> 23 & 1);
    const std::pair<const char*, bool> known[] = {
        {"avx2", supports_avx2()},
        {"avx512", supports_avx512()},
        {"avx512_bf16", supports_avx512_bf16()},
        {"avx512_fp16", avx512_fp16},
        {"amx_bf16", bool(edx >> 22 & 1)},
        {"amx_int8", bool(edx >> 25 & 1)},
    };
    std::vector<std::string> names;
    for (const auto& [name, has] : known)
        if (has) names.push_back(name);
    return names;
}

#elif defined(__aarch64__)

bool supports_bf16() {
#if defined(__linux__) && defined(HWCAP2_BF16)
    return getauxval(AT_HWCAP2) & HWCAP2_BF16;
#else
    return false;
#endif
}

std::vector<std::string> cpu_features() {
    std::vector<std::string> names = {"neon"};
#if defined(__linux__)
    const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
    if (hwcap & HWCAP_ASIMDHP) names.push_back("fp16");
    if (hwcap & HWCAP_SVE) names.push_back("sve");
    if (supports_bf16()) names.push_back("bf16");
#ifdef HWCAP2_I8MM
    if (hwcap2 & HWCAP2_I8MM) names.push_back("i8mm");
#endif
    (void)hwcap2;
#endif
    return names;
}

#else

std::vector<std::string> cpu_features() { return {}; }

#endif

}  // namespace cogsym
