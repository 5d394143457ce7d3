// int4: sixteen steps from a group's least element to its greatest; groups as for int8.

#pragma once

#include "types.h"

namespace {

// Bits to integers of the same order, and back.
template <class T>
inline typename T::Order order(typename T::Bits bits) {
    auto x = (typename T::Order)bits;
    auto sign = (typename T::Order)(x >> (sizeof(x) * 8 - 1));
    return (typename T::Order)(x ^ (sign & (typename T::Order)(T::kSign - 1)));
}

// The least and the greatest element of some group; least > greatest where none counts.
template <class T>
struct Range {
    typedef typename T::Order Order;
    static constexpr Order kNone = (Order)(T::kSign - 1);
    static Order low(typename T::Bits bits) {
        auto mask = (Order)counts<T>(bits);
        return (Order)((order<T>(bits) & mask) | (kNone & ~mask));
    }
    static Order high(typename T::Bits bits) {
        auto mask = (Order)counts<T>(bits);
        return (Order)((order<T>(bits) & mask) | (~kNone & ~mask));
    }
};

template <class T>
inline void scale_int4(const typename T::Order* low, const typename T::Order* high, int64_t n,
                       Parameter* bases, Parameter* scales, float* __restrict wide_bases,
                       float* __restrict inverses) {
    typedef typename T::Bits Bits;
    for (int64_t i = 0; i < n; ++i) {
        bool any = low[i] <= high[i];
        float lowest = T::widen(any ? (Bits)order<T>((Bits)low[i]) : (Bits)0);
        float highest = T::widen(any ? (Bits)order<T>((Bits)high[i]) : (Bits)0);
        // Towards minus infinity: the magnitude up where it is negative, else down.
        uint32_t bits = as_bits(lowest);
        bits = (bits + (bits >> 31 ? 0xffff : 0)) & 0xffff0000;
        float size = as_float(bits & 0x7fffffff);
        bits = size < kLeastBase ? 0 : bits;
        float base = as_float(bits), range = highest - base;
        bool spread = range >= kLeast;
        uint32_t scale = up(range * (1.0f / 15.0f));
        float inverse = 1.0f / as_float(spread ? scale : 0x3f800000);
        bases[i] = (uint16_t)(bits >> 16);
        scales[i] = (uint16_t)(spread ? scale >> 16 : 0);
        wide_bases[i] = base;
        inverses[i] = spread ? inverse : 0.0f;
    }
}

template <class T, class Each>
inline uint32_t int4(typename T::Bits bits, Each base, Each inverse, int64_t i) {
    return as_bits((element<T>(bits) - base[i]) * inverse[i] + kRound) & counts<T>(bits) & 15;
}
template <class T, class Each, class Count>
inline void to_low(const typename T::Bits* x, Count n, Each base, Each inverse,
                   uint8_t* __restrict codes) {
    for (int64_t i = 0; i < n; ++i) codes[i] = (uint8_t)int4<T>(x[i], base, inverse, i);
}
template <class T, class Each, class Count>
inline void to_high(const typename T::Bits* x, Count n, Each base, Each inverse,
                    uint8_t* __restrict codes) {
    for (int64_t i = 0; i < n; ++i)
        codes[i] = (uint8_t)(codes[i] | int4<T>(x[i], base, inverse, i) << 4);
}
template <class T, class Each, class Count>
inline void from_int4(const uint8_t* codes, int shift, Count n, Each base, Each scale,
                      typename T::Bits* __restrict x) {
    for (int64_t i = 0; i < n; ++i)
        x[i] = T::narrow(base[i] + (float)(int32_t)((codes[i] >> shift) & 15) * scale[i]);
}

// One head of one token.
template <class T, class Dim, class Each>
inline void pack(const typename T::Bits* x, Dim dim, Each base, Each inverse, Each high_base,
                 Each high_inverse, uint8_t* codes) {
    int64_t half = (dim + 1) / 2;
    to_low<T>(x, half, base, inverse, codes);
    to_high<T>(x + half, dim - half, high_base, high_inverse, codes);
}
template <class T, class Dim, class Each>
inline void unpack(const uint8_t* codes, Dim dim, Each base, Each scale, Each high_base,
                   Each high_scale, typename T::Bits* x) {
    int64_t half = (dim + 1) / 2;
    from_int4<T>(codes, 0, half, base, scale, x);
    from_int4<T>(codes, 4, dim - half, high_base, high_scale, x + half);
}

// K [tokens, heads, dim] of one layer, so many heads at a time as have kColumns columns.
template <class T>
void encode_int4_keys(const Shape* s, int64_t used, const typename T::Bits* x, Parameter* bases,
                      uint8_t* codes) {
    typedef typename T::Order Order;
    int64_t heads = s->heads, n = heads * s->dim;
    with_dim(s->dim, [=](auto dim) {
        int64_t half = (dim + 1) / 2, together = kColumns / dim;
        Order low[kColumns], high[kColumns];
        float wide[kColumns], inverses[kColumns];
        for (int64_t first = 0; first < heads; first += together) {
            int64_t count = least(together, heads - first), columns = count * dim;
            auto from = x + first * dim;
            for (int64_t i = 0; i < columns; ++i) {
                low[i] = Range<T>::kNone;
                high[i] = (Order)~Range<T>::kNone;
            }
            for (int64_t row = 0; row < used; ++row)
                for (int64_t i = 0; i < columns; ++i) {
                    Order lower = Range<T>::low(from[row * n + i]);
                    Order higher = Range<T>::high(from[row * n + i]);
                    low[i] = lower < low[i] ? lower : low[i];
                    high[i] = higher > high[i] ? higher : high[i];
                }
            Parameter* base = bases + first * dim;
            scale_int4<T>(low, high, columns, base, base + n, wide, inverses);
            for (int64_t row = 0; row < used; ++row)
                for (int64_t i = 0; i < count; ++i) {
                    const float *b = wide + i * dim, *inverse = inverses + i * dim;
                    pack<T>(from + row * n + i * dim, dim, b, inverse, b + half, inverse + half,
                            codes + (row * heads + first + i) * half);
                }
        }
    });
}

template <class T>
void decode_int4_keys(const Shape* s, const Parameter* bases, const uint8_t* codes,
                      typename T::Bits* x) {
    int64_t heads = s->heads, n = heads * s->dim;
    with_dim(s->dim, [=](auto dim) {
        int64_t half = (dim + 1) / 2, together = kColumns / dim;
        float wide[kColumns], scales[kColumns];
        for (int64_t first = 0; first < heads; first += together) {
            int64_t count = least(together, heads - first);
            widen_all(bases + first * dim, count * dim, wide);
            widen_all(bases + n + first * dim, count * dim, scales);
            for (int64_t row = 0; row < s->tokens; ++row)
                for (int64_t i = 0; i < count; ++i) {
                    const float *base = wide + i * dim, *scale = scales + i * dim;
                    unpack<T>(codes + (row * heads + first + i) * half, dim, base, scale,
                              base + half, scale + half, x + row * n + (first + i) * dim);
                }
        }
    });
}

// V [tokens * heads, dim] of one layer.
template <class T>
void encode_int4_values(const Shape* s, int64_t used, const typename T::Bits* x, Parameter* bases,
                        uint8_t* codes) {
    int64_t filled = used * s->heads;
    Parameter* scales = bases + s->tokens * s->heads;
    with_dim(s->dim, [=](auto dim) {
        int64_t half = (dim + 1) / 2;
        typename T::Order low[kGroups], high[kGroups];
        float wide[kGroups], inverses[kGroups];
        for (int64_t at = 0; at < filled; at += kGroups) {
            int64_t count = least(kGroups, filled - at);
            for (int64_t i = 0; i < count; ++i) {
                auto group = x + (at + i) * dim;
                typename T::Order lowest = Range<T>::kNone, highest = ~Range<T>::kNone;
                for (int64_t j = 0; j < dim; ++j) {
                    auto lower = Range<T>::low(group[j]), higher = Range<T>::high(group[j]);
                    lowest = lower < lowest ? lower : lowest;
                    highest = higher > highest ? higher : highest;
                }
                low[i] = lowest, high[i] = highest;
            }
            scale_int4<T>(low, high, count, bases + at, scales + at, wide, inverses);
            for (int64_t i = 0; i < count; ++i) {
                Same base{wide[i]}, inverse{inverses[i]};
                pack<T>(x + (at + i) * dim, dim, base, inverse, base, inverse,
                        codes + (at + i) * half);
            }
        }
    });
}

template <class T>
void encode_int4_as(const Shape* s, int64_t used, const void* block, uint8_t* encoded) {
    int64_t heads = s->heads, n = heads * s->dim, groups = s->tokens * heads;
    int64_t half = (s->dim + 1) / 2, part = groups * half, unused = (s->tokens - used) * heads;
    auto x = (const typename T::Bits*)block;
    auto bases = (Parameter*)encoded;
    uint8_t* codes = (uint8_t*)(bases + s->layers * 2 * (n + groups));
    for (int64_t layer = 0; layer < s->layers; ++layer) {
        Parameter* v_bases = bases + 2 * n;
        encode_int4_keys<T>(s, used, x, bases, codes);
        encode_int4_values<T>(s, used, x + s->tokens * n, v_bases, codes + part);
        for (int64_t i = 0; i < 2; ++i) {
            memset(codes + (i + 1) * part - unused * half, 0, (size_t)(unused * half));
            memset((uint8_t*)(v_bases + (i + 1) * groups - unused), 0,
                   (size_t)unused * sizeof(Parameter));
        }
        x += 2 * s->tokens * n, codes += 2 * part, bases += 2 * (n + groups);
    }
}

template <class T>
void decode_int4_as(const Shape* s, const uint8_t* encoded, void* block) {
    int64_t groups = s->tokens * s->heads, n = s->heads * s->dim, part = groups * ((s->dim + 1) / 2);
    auto x = (typename T::Bits*)block;
    auto bases = (const Parameter*)encoded;
    auto codes = (const uint8_t*)(bases + s->layers * 2 * (n + groups));
    for (int64_t layer = 0; layer < s->layers; ++layer) {
        decode_int4_keys<T>(s, bases, codes, x);
        auto v = x + s->tokens * n;
        auto v_bases = bases + 2 * n;
        auto v_codes = codes + part;
        with_dim(s->dim, [=](auto dim) {
            int64_t half = (dim + 1) / 2;
            for (int64_t i = 0; i < groups; ++i) {
                Same base{as_float((uint32_t)v_bases[i] << 16)};
                Same scale{as_float((uint32_t)v_bases[groups + i] << 16)};
                unpack<T>(v_codes + i * half, dim, base, scale, base, scale, v + i * dim);
            }
        });
        x += 2 * s->tokens * n, codes += 2 * part, bases += 2 * (n + groups);
    }
}

}  // namespace
