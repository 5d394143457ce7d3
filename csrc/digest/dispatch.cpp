// Which bodies this processor can run. Compiled for the plain target.

#include <string.h>

#include "digest.h"
#include "socket.h"

extern "C" const Copier* baton_copier(const char* isa) {
    if (!strcmp(isa, "portable")) return &baton_copier_portable;
#if defined(__x86_64__)
    // Everything that setup.py lets the compiler use in that unit.
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(isa, "avx512") && avx512) return &baton_copier_avx512;
    if (!strcmp(isa, "avx2") && avx2) return &baton_copier_avx2;
#endif
    return nullptr;
}
