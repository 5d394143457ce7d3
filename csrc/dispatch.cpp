// Which bodies this processor can run. Compiled for the plain target.

#include <string.h>

#include <initializer_list>

#include "kernels.h"

static bool runs(const char* isa) {
    if (!strcmp(isa, "portable")) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(isa, "avx2")) return avx2;
    if (!strcmp(isa, "avx512")) return avx512;
    if (!strcmp(isa, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    if (!strcmp(isa, "neon")) return true;
#endif
    return false;
}

extern "C" const Kernels* baton_kernels(const char* isa) {
    if (!runs(isa)) return nullptr;
#if defined(__x86_64__)
    for (const Kernels* body : {&baton_avx512bf16, &baton_avx512, &baton_avx2})
        if (!strcmp(isa, body->isa)) return body;
#elif defined(__aarch64__)
    if (!strcmp(isa, "neon")) return &baton_neon;
#endif
    return &baton_portable;
}
