#if defined(__x86_64__)
#include "simd_avx2.h"
// after the vectors, whose width it needs
#include "body.h"

extern "C" const Kernels baton_avx2 = BATON_KERNELS("avx2");
#endif
