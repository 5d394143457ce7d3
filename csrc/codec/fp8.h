// fp8: e4m3 with a power of two for each head, over all tokens of the block.

#pragma once

#include "most.h"

namespace {

constexpr float kDenormal = 16384.0f;  // 2^14: its unit in the last place is 2^-9, that of e4m3
constexpr uint32_t kBias = 120;        // of binary32 less that of e4m3

// As `up` tells: the upper half of the word. The exponent is raised where the mantissa is above
// that of 448.
inline uint32_t scale_of(float most) {
    uint32_t exponent = (as_bits(most) + 0x1fffff) >> 23;
    return most >= kLeast ? (exponent - 8) << 23 : 0;
}
// 1 / scale, or 0: 2^-e has 254 less the biased exponent of 2^e.
inline float inverse_of(uint32_t scale) {
    return as_float(scale ? (254u << 23) - scale : 0);
}

inline uint8_t e4m3(float x) {
    uint32_t bits = as_bits(x), size = bits & 0x7fffffff;
    uint32_t small = as_bits(as_float(size) + kDenormal) - as_bits(kDenormal);
    uint32_t normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (kBias << 3);
    return (uint8_t)((bits >> 31 << 7) | (as_float(size) < 0x1p-6f ? small : normal));
}

inline float value_of(uint8_t code) {
    uint32_t size = code & 0x7fu;
    float small = as_float(as_bits(kDenormal) | size) - kDenormal;
    uint32_t bits = size < 8 ? as_bits(small) : (size + (kBias << 3)) << 20;
    return as_float(bits | (uint32_t)(code >> 7) << 31);
}

template <class T, class Dim>
inline void to_e4m3(const typename T::Bits* x, Dim dim, float inverse, uint8_t* __restrict codes) {
    for (int64_t i = 0; i < dim; ++i) codes[i] = e4m3(element<T>(x[i]) * inverse);
}

template <class T, class Dim>
inline void from_e4m3(const uint8_t* codes, Dim dim, float scale, typename T::Bits* __restrict x) {
    for (int64_t i = 0; i < dim; ++i) x[i] = T::narrow(value_of(codes[i]) * scale);
}

// K or V [tokens, heads, dim] of one layer.
template <class T>
void encode_fp8_part(const Shape* s, int64_t used, const typename T::Bits* x, Parameter* scales,
                     uint8_t* codes) {
    int64_t heads = s->heads, n = heads * s->dim;
    with_dim(s->dim, [=](auto dim) {
        int64_t together = kColumns / dim;
        typename T::Bits most[kColumns];
        float inverses[kColumns];
        for (int64_t at = 0; at < heads; at += together) {
            int64_t count = least(together, heads - at);
            most_of_columns<T>(x + at * dim, used, n, count * dim, most);
            for (int64_t i = 0; i < count; ++i) {
                uint32_t scale = scale_of(T::widen(most_of<T>(most + i * dim, dim)));
                scales[at + i] = (uint16_t)(scale >> 16);
                inverses[i] = inverse_of(scale);
            }
            for (int64_t row = 0; row < used; ++row)
                for (int64_t i = 0; i < count; ++i) {
                    int64_t first = row * n + (at + i) * dim;
                    to_e4m3<T>(x + first, dim, inverses[i], codes + first);
                }
        }
    });
    memset(codes + used * n, 0, (size_t)((s->tokens - used) * n));
}

template <class T>
void encode_fp8_as(const Shape* s, int64_t used, const void* block, uint8_t* encoded) {
    int64_t part = s->tokens * s->heads * s->dim;
    auto x = (const typename T::Bits*)block;
    auto scales = (Parameter*)encoded;
    uint8_t* codes = (uint8_t*)(scales + s->layers * 2 * s->heads);
    for (int64_t i = 0; i < 2 * s->layers; ++i)
        encode_fp8_part<T>(s, used, x + i * part, scales + i * s->heads, codes + i * part);
}

template <class T>
void decode_fp8_as(const Shape* s, const uint8_t* encoded, void* block) {
    auto x = (typename T::Bits*)block;
    auto scales = (const Parameter*)encoded;
    auto codes = (const uint8_t*)(scales + s->layers * 2 * s->heads);
    with_dim(s->dim, [=](auto dim) mutable {
        for (int64_t part = 0; part < 2 * s->layers; ++part, scales += s->heads)
            for (int64_t row = 0; row < s->tokens; ++row)
                for (int64_t i = 0; i < s->heads; ++i, x += dim, codes += dim)
                    from_e4m3<T>(codes, dim, as_float((uint32_t)scales[i] << 16), x);
    });
}

}  // namespace
