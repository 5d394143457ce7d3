// One instruction set's codecs. Everything is in an unnamed namespace and uses no library
// templates: nothing compiled for this instruction set may be merged with another's.

#pragma once

#include "fp8.h"
#include "int4.h"
#include "int8.h"

#define BATON_FOR_BOTH(name)                                                          \
    void encode_##name(const Shape* s, int64_t used, const void* block, uint8_t* to) { \
        (s->dtype == kBlockBf16 ? encode_##name##_as<Bf16>                            \
                                : encode_##name##_as<Fp32>)(s, used, block, to);      \
    }                                                                                 \
    void decode_##name(const Shape* s, const uint8_t* from, void* block) {            \
        (s->dtype == kBlockBf16 ? decode_##name##_as<Bf16>                            \
                                : decode_##name##_as<Fp32>)(s, from, block);          \
    }

namespace {

BATON_FOR_BOTH(int8)
BATON_FOR_BOTH(fp8)
BATON_FOR_BOTH(int4)

}  // namespace

#define BATON_CODECS(isa)                                                           \
    {                                                                               \
        kCodecVersion, isa, encode_int8, encode_fp8, encode_int4, decode_int8, decode_fp8, \
            decode_int4                                                             \
    }
