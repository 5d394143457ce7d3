#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")  // else gcc makes vectors of half the width
#endif
#include "lanes_avx512.h"

// after the lanes, which it can use
#include "body.h"

extern "C" const Codecs baton_codecs_avx512 = BATON_CODECS("avx512");
#endif
