// Which codec bodies this processor can run. Compiled for the plain target.

#include <string.h>

#include "codec.h"

extern "C" const Codecs* baton_codecs(const char* isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(isa, "avx512")) return avx512 ? &baton_codecs_avx512 : nullptr;
    if (!strcmp(isa, "avx2")) return avx2 ? &baton_codecs_avx2 : nullptr;
#endif
    return strcmp(isa, "portable") ? nullptr : &baton_codecs_portable;
}
