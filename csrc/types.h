// The two element types, and what is done alike for both.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace {

// Under so many multiplications a loop stays on its thread: waking others would take longer.
constexpr int64_t kSerialWork = 1 << 15;

struct Bf16 {
    typedef uint16_t Value;
    static constexpr int64_t kPack = 2;
    static V16 dot(V16 sum, uint32_t x, W16 w) { return dot_pairs(sum, x, w); }
    // Sixteen numbers of at least 2^-126, or 0, as `dot` takes them for x; returns what was stored.
    static V16 store_weights(uint32_t* p, V16 x) { return store_narrow((uint16_t*)p, x); }
    // Words for `dot` of 32 columns of kPack rows.
    static void load_columns(const Value* const* rows, int64_t at, W16* two) {
        interleave_32(rows[0] + at, rows[1] + at, two);
    }
};

struct Fp32 {
    typedef float Value;
    static constexpr int64_t kPack = 1;
    static V16 dot(V16 sum, uint32_t x, W16 w) {
        float value;
        memcpy(&value, &x, 4);
        return fma(set1(value), as_floats(w), sum);
    }
    static V16 store_weights(uint32_t* p, V16 x) {
        store_words(p, as_words(x));
        return x;
    }
    static void load_columns(const Value* const* rows, int64_t at, W16* two) {
        two[0] = load_words((const uint32_t*)rows[0] + at);
        two[1] = load_words((const uint32_t*)rows[0] + at + 16);
    }
};

template <class T>
inline int64_t steps_of(int64_t k) {
    return (k + T::kPack - 1) / T::kPack;
}

// The last vector of a row, its missing lanes 0. A whole one is loaded as any other.
template <class Value>
inline V16 load_up_to(const Value* p, int64_t n) {
    return n >= 16 ? load(p) : load_some(p, n);
}
template <class Value>
inline void store_up_to(Value* p, V16 x, int64_t n) {
    if (n >= 16)
        store(p, x);
    else
        store_some(p, x, n);
}

// i as a number of lanes.
inline int64_t within_16(int64_t i) { return i < 0 ? 0 : i > 16 ? 16 : i; }

// e^x to 2 ulp for -86 <= x <= 88; 0 below, e^88 above; NaN stays NaN. The coefficients are those
// of the Cephes library's expf.
inline V16 exp16(V16 x) {
    const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    V16 within = max(set1(-86.0f), min(set1(88.0f), x));
    V16 shifted = fma(within, set1(1.44269504f), set1(kRound));
    V16 n = sub(shifted, set1(kRound));
    V16 r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), within));
    V16 sum = set1(1.9875691500e-4f);
    sum = fma(sum, r, set1(1.3981999507e-3f));
    sum = fma(sum, r, set1(8.3334519073e-3f));
    sum = fma(sum, r, set1(4.1665795894e-2f));
    sum = fma(sum, r, set1(1.6666665459e-1f));
    sum = fma(sum, r, set1(5.0000001201e-1f));
    sum = add(fma(sum, mul(r, r), r), set1(1.0f));
    return zero_below(set1(-86.0f), x, mul(sum, power_of_two(shifted)));
}

// 2^x to 2 ulp for x <= 0, but never less than about 2^-126. Coefficients fitted on
// |x| <= 1/2 for the least relative error.
inline V16 exp2_16(V16 x) {
    const float kRound = 12582912.0f;
    V16 within = max(set1(-126.0f), x);
    V16 shifted = add(within, set1(kRound));
    V16 r = sub(within, sub(shifted, set1(kRound)));
    V16 sum = set1(1.545316336e-04f);
    sum = fma(sum, r, set1(1.339086331e-03f));
    sum = fma(sum, r, set1(9.618083015e-03f));
    sum = fma(sum, r, set1(5.550356954e-02f));
    sum = fma(sum, r, set1(2.402265072e-01f));
    sum = fma(sum, r, set1(6.931471825e-01f));
    sum = fma(sum, r, set1(1.0f));
    return mul(sum, power_of_two(shifted));
}

// to[word * stride + i] = rows[i][word] for 16 rows.
inline void transpose(const uint32_t* const* rows, int64_t words, uint32_t* to, int64_t stride) {
    int64_t word = 0;
    for (; word + 16 <= words; word += 16) transpose_16(rows, word, to + word * stride, stride);
    for (; word < words; ++word)
        for (int64_t i = 0; i < 16; ++i) to[word * stride + i] = rows[i][word];
}

}  // namespace
