// The wire codecs: blocks of KV in fewer bytes. The C ABI, and what the bytes are.
//
// A block is [layers, 2 (K, V), tokens, heads, dim] of bf16 or fp32, contiguous, little-endian. Of
// its tokens the first `used` are filled; what the other slots hold is never looked at.
//
// An encoded block is its parameters, then its codes; its length depends on the shape alone. Every
// parameter is a bf16, little-endian. n = heads * dim.
//
//   int8   parameters [layers]{ K: scale [n]          V: scale [tokens, heads] }
//          codes      [layers, 2, tokens, heads, dim] int8
//   fp8    parameters [layers]{ K: scale [heads]      V: scale [heads] }
//          codes      [layers, 2, tokens, heads, dim] e4m3
//   int4   parameters [layers]{ K: base [n], scale [n]
//                               V: base [tokens, heads], scale [tokens, heads] }
//          codes      [layers, 2, tokens, heads, half] bytes, half = ceil(dim / 2): element i in
//                     the low four bits of byte i, element half + i in its high four bits
//
// A parameter belongs to a group of elements: a channel of K over the used tokens, a head of one
// token of V (int8, int4), or a head over the used tokens (fp8). Codes of unused tokens are 0, and
// so are parameters of groups that have no used token.
//
// Arithmetic is IEEE binary32, each operation rounded to nearest even and none fused, so that all
// bodies (and the one in Python) give the same bytes. `up` rounds a positive number up to bf16,
// `down` rounds towards minus infinity, `round` to the nearest integer, ties to even.
//
//   An element that is not finite, or of magnitude 2^120 or more, takes no part in its group; its
//   code is 0. `most` is the greatest magnitude of the group's other elements.
//
//   int8   scale = up(most * (1 / 127)), or 0 if most < 2^-90
//          code  = round(x * (1 / scale)), between -127 and 127; 0 where scale is 0
//          x     = code * scale
//   fp8    scale = the least power of two with most <= 448 * scale, or 0 if most < 2^-90
//          code  = e4m3(x * (1 / scale)) with the sign of x; 0 where scale is 0
//          x     = value(code) * scale
//          e4m3 has a sign, 4 bits of exponent (bias 7) and 3 of mantissa, is rounded to nearest
//          even, and denormal below 2^-6. `value` knows no NaN: code 0x7f is 480. Encoding gives
//          at most 0x7e, which is 448.
//   int4   base  = down(least element), or 0 if its magnitude is under 2^-100
//          range = greatest element - base
//          scale = up(range * (1 / 15)), or 0 if range < 2^-90
//          code  = round((x - base) * (1 / scale)), between 0 and 15; 0 where scale is 0
//          x     = base + code * scale
//
// Decoded elements are rounded to the block's type, to nearest even. The limits keep every step
// within the normal numbers and finite, so that no result depends on how a thread treats
// denormals. Decoding takes any bytes of the right length.

#pragma once

#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the codecs write the numbers as they lie in memory, which must be little-endian"
#endif

constexpr int32_t kBlockBf16 = 0, kBlockFp32 = 1;

// All sizes are at least 1; dim is at most kMaxDim.
constexpr int64_t kMaxDim = 512;

struct Shape {
    int64_t layers;
    int64_t tokens;
    int64_t heads;
    int64_t dim;
    int32_t dtype;
};

// `block` is aligned as its elements are, `encoded` need not be; they do not overlap.
// 0 <= used <= tokens. Nothing is allocated, and nothing outside the two is read or written.
typedef void (*Encode)(const Shape* shape, int64_t used, const void* block, uint8_t* encoded);
typedef void (*Decode)(const Shape* shape, const uint8_t* encoded, void* block);

// Raised with every change of this header or of any byte that is written.
constexpr int64_t kCodecVersion = 1;

struct Codecs {
    int64_t version;
    const char* isa;
    Encode encode_int8, encode_fp8, encode_int4;
    Decode decode_int8, decode_fp8, decode_int4;
};

// The table for an instruction set ("avx512", "avx2", "portable"); null if this processor does
// not have it, or this build does not.
extern "C" __attribute__((visibility("default"))) const Codecs* baton_codecs(const char* isa);

extern "C" {
extern const Codecs baton_codecs_avx512, baton_codecs_avx2, baton_codecs_portable;
}
