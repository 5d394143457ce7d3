#if defined(__aarch64__)
#include "simd_neon.h"
// after the vectors, whose width it needs
#include "body.h"

extern "C" const Kernels baton_neon = BATON_KERNELS("neon");
#endif
