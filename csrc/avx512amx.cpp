#if defined(__x86_64__)
#include "simd_avx512.h"
// after the vectors, whose width it needs
#include "body.h"

extern "C" const Kernels baton_avx512amx = BATON_KERNELS("avx512amx");
#endif
