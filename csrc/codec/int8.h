// int8: keys with a scale for each channel, values with one for each head of a token.

#pragma once

#include "most.h"

namespace {

template <class T>
inline void scale_int8(const typename T::Bits* most, int64_t n, Parameter* scales,
                       float* __restrict inverses) {
    for (int64_t i = 0; i < n; ++i) {
        float x = T::widen(most[i]);
        bool any = x >= kLeast;
        uint32_t scale = up(x * (1.0f / 127.0f));
        float inverse = 1.0f / as_float(any ? scale : 0x3f800000);
        scales[i] = (uint16_t)(any ? scale >> 16 : 0);
        inverses[i] = any ? inverse : 0.0f;
    }
}

template <class T, class Inverse, class Count>
inline void to_int8(const typename T::Bits* x, Count n, Inverse inverse,
                    uint8_t* __restrict codes) {
    int64_t i = 0;
#if defined(BATON_LANES)
    for (; i + kLanes <= n; i += kLanes)
        store_codes(codes + i, elements(x + i) * lanes_of(inverse, i));
#endif
    for (; i < n; ++i) codes[i] = (uint8_t)as_bits(element<T>(x[i]) * inverse[i] + kRound);
}

template <class T, class Scale, class Count>
inline void from_int8(const uint8_t* codes, Count n, Scale scale,
                      typename T::Bits* __restrict x) {
    int64_t i = 0;
#if defined(BATON_LANES)
    for (; i + kLanes <= n; i += kLanes)
        store_elements(x + i, load_codes(codes + i) * lanes_of(scale, i));
#endif
    for (; i < n; ++i) x[i] = T::narrow((float)(int8_t)codes[i] * scale[i]);
}

// K [tokens, n] of one layer.
template <class T>
void encode_int8_keys(const Shape* s, int64_t used, const typename T::Bits* x, Parameter* scales,
                      uint8_t* codes) {
    int64_t n = s->heads * s->dim;
    typename T::Bits most[kColumns];
    float inverses[kColumns];
    for (int64_t at = 0; at < n; at += kColumns) {
        int64_t columns = least(kColumns, n - at);
        most_of_columns<T>(x + at, used, n, columns, most);
        scale_int8<T>(most, columns, scales + at, inverses);
        for (int64_t row = 0; row < used; ++row)
            to_int8<T>(x + row * n + at, columns, inverses, codes + row * n + at);
    }
    memset(codes + used * n, 0, (size_t)((s->tokens - used) * n));
}

// V [tokens * heads, dim] of one layer.
template <class T>
void encode_int8_values(const Shape* s, int64_t used, const typename T::Bits* x,
                        Parameter* scales, uint8_t* codes) {
    int64_t groups = s->tokens * s->heads, filled = used * s->heads;
    with_dim(s->dim, [=](auto dim) {
        typename T::Bits most[kGroups];
        float inverses[kGroups];
        for (int64_t at = 0; at < filled; at += kGroups) {
            int64_t count = least(kGroups, filled - at);
            for (int64_t i = 0; i < count; ++i) most[i] = most_of<T>(x + (at + i) * dim, dim);
            scale_int8<T>(most, count, scales + at, inverses);
            for (int64_t i = 0; i < count; ++i)
                to_int8<T>(x + (at + i) * dim, dim, Same{inverses[i]}, codes + (at + i) * dim);
        }
    });
    memset((uint8_t*)(scales + filled), 0, (size_t)(groups - filled) * sizeof(Parameter));
    memset(codes + filled * s->dim, 0, (size_t)((groups - filled) * s->dim));
}

template <class T>
void encode_int8_as(const Shape* s, int64_t used, const void* block, uint8_t* encoded) {
    int64_t n = s->heads * s->dim, groups = s->tokens * s->heads, half = s->tokens * n;
    auto x = (const typename T::Bits*)block;
    auto scales = (Parameter*)encoded;
    uint8_t* codes = (uint8_t*)(scales + s->layers * (n + groups));
    for (int64_t layer = 0; layer < s->layers; ++layer) {
        encode_int8_keys<T>(s, used, x, scales, codes);
        encode_int8_values<T>(s, used, x + half, scales + n, codes + half);
        x += 2 * half, codes += 2 * half, scales += n + groups;
    }
}

template <class T>
void decode_int8_as(const Shape* s, const uint8_t* encoded, void* block) {
    int64_t n = s->heads * s->dim, groups = s->tokens * s->heads, half = s->tokens * n;
    auto x = (typename T::Bits*)block;
    auto scales = (const Parameter*)encoded;
    auto codes = (const uint8_t*)(scales + s->layers * (n + groups));
    float wide[kColumns];
    for (int64_t layer = 0; layer < s->layers; ++layer) {
        for (int64_t at = 0; at < n; at += kColumns) {
            int64_t columns = least(kColumns, n - at);
            widen_all(scales + at, columns, wide);
            for (int64_t row = 0; row < s->tokens; ++row)
                from_int8<T>(codes + row * n + at, columns, (const float*)wide, x + row * n + at);
        }
        auto v = x + half;
        auto v_codes = codes + half;
        with_dim(s->dim, [=](auto dim) {
            for (int64_t i = 0; i < groups; ++i) {
                Same scale{as_float((uint32_t)scales[n + i] << 16)};
                from_int8<T>(v_codes + i * dim, dim, scale, v + i * dim);
            }
        });
        x += 2 * half, codes += 2 * half, scales += n + groups;
    }
}

}  // namespace
