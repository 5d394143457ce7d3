// Vectors of 16 lanes as four of the compiler's own 4-lane vectors, which every 64-bit processor
// has. Products are rounded before they are added: not every target has a fused multiply-add.

#pragma once

#include <stdint.h>
#include <string.h>

namespace {

typedef float F4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));

struct V16 {
    F4 part[4];
};
struct W16 {
    U4 part[4];
};

// Register tiles: rows x (kVectors * 16) columns for products, rows x (kWide * 16) for P V.
constexpr int kVectors = 1, kRows = 2, kBusyRows = 1, kWide = 2, kWideRows = 1;

// A register of doubles, with the compiler's own operators.
typedef double Doubles __attribute__((vector_size(16)));
inline Doubles fma(Doubles x, Doubles y, Doubles z) { return x * y + z; }
// A bit for each lane, set where the number's sign is.
inline uint32_t signs(Doubles x) {
    uint64_t bits[2];
    memcpy(bits, &x, 16);
    return (uint32_t)(bits[0] >> 63 | bits[1] >> 63 << 1);
}

#define EACH(expression)                                       \
    V16 result;                                                \
    for (int i = 0; i < 4; ++i) result.part[i] = (expression); \
    return result

inline V16 set1(float x) { EACH((F4{x, x, x, x})); }
inline V16 load(const float* p) {
    V16 x;
    memcpy(&x, p, 64);
    return x;
}
inline void store(float* p, V16 x) { memcpy(p, &x, 64); }
inline V16 load_some(const float* p, int64_t n) {
    V16 x = set1(0);
    memcpy(&x, p, (size_t)n * 4);
    return x;
}
inline void store_some(float* p, V16 x, int64_t n) { memcpy(p, &x, (size_t)n * 4); }
inline V16 add(V16 x, V16 y) { EACH(x.part[i] + y.part[i]); }
inline V16 sub(V16 x, V16 y) { EACH(x.part[i] - y.part[i]); }
inline V16 mul(V16 x, V16 y) { EACH(x.part[i] * y.part[i]); }
inline V16 div(V16 x, V16 y) { EACH(x.part[i] / y.part[i]); }
inline V16 fma(V16 x, V16 y, V16 z) { EACH(x.part[i] * y.part[i] + z.part[i]); }
inline F4 choose(U4 mask, F4 x, F4 y) { return (F4)((mask & (U4)x) | (~mask & (U4)y)); }
// The second operand if either is NaN.
inline V16 max(V16 x, V16 y) {
    EACH(choose((U4)(x.part[i] > y.part[i]), x.part[i], y.part[i]));
}
inline V16 min(V16 x, V16 y) {
    EACH(choose((U4)(x.part[i] < y.part[i]), x.part[i], y.part[i]));
}
// y where limit <= x or x is NaN, else 0.
inline V16 zero_below(V16 limit, V16 x, V16 y) {
    EACH((F4)(~(U4)(x.part[i] < limit.part[i]) & (U4)y.part[i]));
}
// x in lanes from <= i < to, else `other`.
inline V16 keep(V16 x, int64_t from, int64_t to, V16 other) {
    float lanes[16], rest[16];
    store(lanes, x);
    store(rest, other);
    for (int64_t i = 0; i < 16; ++i)
        if (i < from || i >= to) lanes[i] = rest[i];
    return load(lanes);
}

// The sum of all lanes, as a tree: lane i with i + 8, then + 4, + 2, + 1.
inline float sum_lanes(V16 x) {
    F4 quarter = (x.part[0] + x.part[2]) + (x.part[1] + x.part[3]);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
inline float max_lanes(V16 x) {
    float lanes[16], most;
    store(lanes, x);
    most = lanes[0];
    for (int i = 1; i < 16; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

inline W16 load_words(const uint32_t* p) {
    W16 x;
    memcpy(&x, p, 64);
    return x;
}
inline void store_words(uint32_t* p, W16 x) { memcpy(p, &x, 64); }
inline W16 as_words(V16 x) {
    W16 words;
    memcpy(&words, &x, 64);
    return words;
}
inline V16 as_floats(W16 x) { EACH((F4)x.part[i]); }
inline V16 low_bf16(W16 x) { EACH((F4)(x.part[i] << 16)); }
inline V16 high_bf16(W16 x) { EACH((F4)(x.part[i] & 0xffff0000u)); }
// 2^n for the integers in a sum x + kRound (see exp16).
inline V16 power_of_two(V16 x) { EACH((F4)(((U4)x.part[i] + 127u) << 23)); }

inline V16 load(const uint16_t* p) {
    EACH((F4)((U4){p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]} << 16));
}
inline V16 load_some(const uint16_t* p, int64_t n) {
    uint16_t all[16] = {};
    memcpy(all, p, (size_t)n * 2);
    return load(all);
}
#undef EACH

// To nearest, ties to even; NaN stays NaN.
inline void store_some(uint16_t* p, V16 x, int64_t n) {
    uint32_t bits[16];
    memcpy(bits, &x, 64);
    for (int64_t i = 0; i < n; ++i) {
        uint32_t up = bits[i] + 0x7fff + (bits[i] >> 16 & 1);
        bool nan = (bits[i] & 0x7fffffff) > 0x7f800000;
        p[i] = (uint16_t)((nan ? bits[i] | 0x400000 : up) >> 16);
    }
}
inline void store(uint16_t* p, V16 x) { store_some(p, x, 16); }

// Of numbers that are normal or 0: rounds as `store` does, and returns what was stored.
inline V16 store_narrow(uint16_t* p, V16 x) {
    store(p, x);
    return load(p);
}
// Words of (a, b) for 32 neighbours.
inline void interleave_32(const uint16_t* a, const uint16_t* b, W16* two) {
    uint32_t words[32];
    for (int i = 0; i < 32; ++i) words[i] = a[i] | (uint32_t)b[i] << 16;
    memcpy(two, words, 128);
}

// Products of 16 pairs of bf16 with one pair, both added.
inline V16 dot_pairs(V16 sum, uint32_t x, W16 w) {
    float even, odd;
    uint32_t low = x << 16, high = x & 0xffff0000u;
    memcpy(&even, &low, 4);
    memcpy(&odd, &high, 4);
    return fma(set1(odd), high_bf16(w), fma(set1(even), low_bf16(w), sum));
}

inline void transpose_16(const uint32_t* const* rows, int64_t at, uint32_t* to, int64_t stride) {
    for (int64_t word = 0; word < 16; ++word)
        for (int64_t i = 0; i < 16; ++i) to[word * stride + i] = rows[i][at + word];
}

}  // namespace
