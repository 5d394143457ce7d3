// What the codecs share: the element types, parameters as bf16, and loops of constant length.
//
// Everything is plain loops, which the compiler turns into vectors of whatever instruction set a
// body is compiled for. No branch, no library call and no reduction of floats is in an inner loop:
// magnitudes and orders are compared as integers. Where the compiler does badly, an instruction set
// brings lanes (lanes_*.h), and a plain loop does what they leave.

#pragma once

#include <string.h>

#include "codec.h"

namespace {

typedef uint16_t Parameter __attribute__((aligned(1)));  // encoded bytes may start anywhere

// So much larger than 2^22 that adding it rounds to an integer, which is then in the low bits.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr float kLeast = 0x1p-90f;
constexpr float kLeastBase = 0x1p-100f;

// Groups that are worked on together, and columns likewise: what they need stays in the L1 cache.
constexpr int64_t kGroups = 128, kColumns = kMaxDim;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

struct Bf16 {
    typedef uint16_t Bits;
    typedef int16_t Order;
    static constexpr Bits kSign = 0x8000, kLimit = 0x7b80;  // 2^120
    static float widen(Bits bits) { return as_float((uint32_t)bits << 16); }
    static Bits narrow(float x) {
        uint32_t bits = as_bits(x);
        return (Bits)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
};

struct Fp32 {
    typedef uint32_t Bits;
    typedef int32_t Order;
    static constexpr Bits kSign = 0x80000000, kLimit = 0x7b800000;
    static float widen(Bits bits) { return as_float(bits); }
    static Bits narrow(float x) { return as_bits(x); }
};

// All ones for an element that counts, else 0. (Written so that no compiler makes a branch of it.)
template <class T>
inline typename T::Bits counts(typename T::Bits bits) {
    typedef typename T::Order Order;
    Order size = (Order)(bits & (T::kSign - 1));
    return (typename T::Bits)((Order)(size - (Order)T::kLimit) >> (sizeof(Order) * 8 - 1));
}
// The magnitude of an element that counts, else 0; its order is that of the bits.
template <class T>
inline typename T::Bits magnitude(typename T::Bits bits) {
    return (typename T::Bits)(bits & (T::kSign - 1) & counts<T>(bits));
}
// The element if it counts, else 0.
template <class T>
inline float element(typename T::Bits bits) {
    return T::widen((typename T::Bits)(bits & counts<T>(bits)));
}

// A positive number rounded up to bf16, in the upper half of the word.
inline uint32_t up(float x) { return (as_bits(x) + 0xffff) & 0xffff0000; }

// A parameter that is the same for a whole run of elements, to be read like one for each.
struct Same {
    float value;
    float operator[](int64_t) const { return value; }
};

// The usual sizes of a head as constants, so that loops over one have no remainder.
template <int64_t N>
struct Const {
    constexpr operator int64_t() const { return N; }
};
struct Any {
    int64_t n;
    operator int64_t() const { return n; }
};
template <class F>
inline void with_dim(int64_t dim, F f) {
    switch (dim) {
        case 32: return f(Const<32>());
        case 64: return f(Const<64>());
        case 128: return f(Const<128>());
        default: return f(Any{dim});
    }
}

inline void widen_all(const Parameter* from, int64_t n, float* __restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = as_float((uint32_t)from[i] << 16);
}

}  // namespace
