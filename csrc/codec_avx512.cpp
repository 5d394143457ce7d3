#if defined(__x86_64__)
#include "codec_body.h"

extern "C" const Codecs baton_codecs_avx512 = BATON_CODECS("avx512");
#endif
