// Which bodies this processor can run. Compiled for the plain target.

#include <string.h>

#include <initializer_list>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Whether there are tiles, for bf16, and this process may use them: Linux wants to be asked once a
// process, since they make the memory larger that it keeps for every thread.
static bool may_use_tiles() {
#if defined(__linux__)
    unsigned a, b, c, d;
    constexpr unsigned kBf16Tiles = 1u << 22, kTiles = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & kBf16Tiles) || !(d & kTiles)) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

static bool runs(const char* isa) {
    if (!strcmp(isa, "portable")) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(isa, "avx2")) return avx2;
    if (!strcmp(isa, "avx512")) return avx512;
    if (!strcmp(isa, "avx512bf16")) return avx512bf16;
    if (!strcmp(isa, "avx512amx")) {
        static const bool tiles = may_use_tiles();
        return avx512bf16 && tiles;
    }
#elif defined(__aarch64__)
    if (!strcmp(isa, "neon")) return true;
#endif
    return false;
}

extern "C" const Kernels* baton_kernels(const char* isa) {
    if (!runs(isa)) return nullptr;
#if defined(__x86_64__)
    for (const Kernels* body : {&baton_avx512amx, &baton_avx512bf16, &baton_avx512, &baton_avx2})
        if (!strcmp(isa, body->isa)) return body;
#elif defined(__aarch64__)
    if (!strcmp(isa, "neon")) return &baton_neon;
#endif
    return &baton_portable;
}
