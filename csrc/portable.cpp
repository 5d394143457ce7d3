#include "simd_portable.h"
// after the vectors, whose width it needs
#include "body.h"

extern "C" const Kernels baton_portable = BATON_KERNELS("portable");
