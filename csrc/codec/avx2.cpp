#if defined(__x86_64__)
#include "body.h"

extern "C" const Codecs baton_codecs_avx2 = BATON_CODECS("avx2");
#endif
