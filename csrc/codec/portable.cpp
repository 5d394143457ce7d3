#include "body.h"

extern "C" const Codecs baton_codecs_portable = BATON_CODECS("portable");
