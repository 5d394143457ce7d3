// Vectors of 16 lanes on Advanced SIMD of 64-bit Arm: four registers. The same arithmetic, lane
// for lane, as on AVX2: bf16 is widened by shifts and multiplied in fp32.
//
// This was run under emulation only (`make neon`): nothing is known of its speed, and the sizes of
// the tiles are AVX2's. There all results were AVX2's bits. They were the portable body's for
// packing, look-ups, angles, draws, and products of bf16, which are exact before they are added;
// where fp32 products are added up, fused here and rounded there, the two are only close.

#pragma once

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace {

struct V16 {
    float32x4_t part[4];
};
struct W16 {
    uint32x4_t part[4];
};

// Register tiles: rows x (kVectors * 16) columns for products, rows x (kWide * 16) for P V.
constexpr int kVectors = 1, kRows = 5, kBusyRows = 4, kWide = 2, kWideRows = 2;

// A register of doubles, with the compiler's own operators.
typedef double Doubles __attribute__((vector_size(16)));
inline Doubles fma(Doubles x, Doubles y, Doubles z) {
    return (Doubles)vfmaq_f64((float64x2_t)z, (float64x2_t)x, (float64x2_t)y);
}
// A bit for each lane, set where the number's sign is.
inline uint32_t signs(Doubles x) {
    uint64x2_t bits = vshrq_n_u64((uint64x2_t)x, 63);
    return (uint32_t)(vgetq_lane_u64(bits, 0) | vgetq_lane_u64(bits, 1) << 1);
}

#define EACH(Type, expression)                                  \
    Type result;                                                \
    for (int i = 0; i < 4; ++i) result.part[i] = (expression); \
    return result

inline V16 set1(float x) { EACH(V16, vdupq_n_f32(x)); }
inline V16 load(const float* p) { EACH(V16, vld1q_f32(p + 4 * i)); }
inline void store(float* p, V16 x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.part[i]);
}
inline V16 load_some(const float* p, int64_t n) {
    float all[16] = {};
    memcpy(all, p, (size_t)n * 4);
    return load(all);
}
inline void store_some(float* p, V16 x, int64_t n) {
    float all[16];
    store(all, x);
    memcpy(p, all, (size_t)n * 4);
}
inline V16 add(V16 x, V16 y) { EACH(V16, vaddq_f32(x.part[i], y.part[i])); }
inline V16 sub(V16 x, V16 y) { EACH(V16, vsubq_f32(x.part[i], y.part[i])); }
inline V16 mul(V16 x, V16 y) { EACH(V16, vmulq_f32(x.part[i], y.part[i])); }
inline V16 div(V16 x, V16 y) { EACH(V16, vdivq_f32(x.part[i], y.part[i])); }
inline V16 fma(V16 x, V16 y, V16 z) { EACH(V16, vfmaq_f32(z.part[i], x.part[i], y.part[i])); }
// The second operand if either is NaN.
inline float32x4_t max(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
inline V16 max(V16 x, V16 y) { EACH(V16, max(x.part[i], y.part[i])); }
inline V16 min(V16 x, V16 y) {
    EACH(V16, vbslq_f32(vcltq_f32(x.part[i], y.part[i]), x.part[i], y.part[i]));
}
// y where limit <= x or x is NaN, else 0.
inline V16 zero_below(V16 limit, V16 x, V16 y) {
    EACH(V16, (float32x4_t)vbicq_u32((uint32x4_t)y.part[i],
                                     vcltq_f32(x.part[i], limit.part[i])));
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
    float32x4_t quarter =
        vaddq_f32(vaddq_f32(x.part[0], x.part[2]), vaddq_f32(x.part[1], x.part[3]));
    float32x2_t pair = vadd_f32(vget_low_f32(quarter), vget_high_f32(quarter));
    return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
}
inline float max_lanes(V16 x) {
    float32x4_t quarter = max(max(x.part[0], x.part[2]), max(x.part[1], x.part[3]));
    float lanes[4];
    vst1q_f32(lanes, quarter);
    float low = lanes[0] > lanes[2] ? lanes[0] : lanes[2];
    float high = lanes[1] > lanes[3] ? lanes[1] : lanes[3];
    return low > high ? low : high;
}

inline W16 load_words(const uint32_t* p) { EACH(W16, vld1q_u32(p + 4 * i)); }
inline void store_words(uint32_t* p, W16 x) {
    for (int i = 0; i < 4; ++i) vst1q_u32(p + 4 * i, x.part[i]);
}
inline W16 as_words(V16 x) { EACH(W16, vreinterpretq_u32_f32(x.part[i])); }
inline V16 as_floats(W16 x) { EACH(V16, vreinterpretq_f32_u32(x.part[i])); }
inline V16 low_bf16(W16 x) { EACH(V16, vreinterpretq_f32_u32(vshlq_n_u32(x.part[i], 16))); }
inline V16 high_bf16(W16 x) {
    EACH(V16, vreinterpretq_f32_u32(vandq_u32(x.part[i], vdupq_n_u32(0xffff0000u))));
}
// 2^n for the integers in a sum x + kRound (see exp16).
inline V16 power_of_two(V16 x) {
    EACH(V16, vreinterpretq_f32_u32(vshlq_n_u32(
                  vaddq_u32(vreinterpretq_u32_f32(x.part[i]), vdupq_n_u32(127)), 23)));
}

inline V16 load(const uint16_t* p) {
    EACH(V16, vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p + 4 * i)), 16)));
}
inline V16 load_some(const uint16_t* p, int64_t n) {
    uint16_t all[16] = {};
    memcpy(all, p, (size_t)n * 2);
    return load(all);
}
// To nearest, ties to even; NaN stays NaN.
inline uint16x4_t rounded(float32x4_t x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), up, quiet), 16);
}
inline void store(uint16_t* p, V16 x) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, rounded(x.part[i]));
}
inline void store_some(uint16_t* p, V16 x, int64_t n) {
    uint16_t all[16];
    store(all, x);
    memcpy(p, all, (size_t)n * 2);
}

// Of numbers that are normal or 0: rounds as `store` does, and returns what was stored.
inline V16 store_narrow(uint16_t* p, V16 x) {
    store(p, x);
    return load(p);
}
// Words of (a, b) for 32 neighbours.
inline void interleave_32(const uint16_t* a, const uint16_t* b, W16* two) {
    for (int i = 0; i < 4; ++i) {
        uint16x8x2_t both = vzipq_u16(vld1q_u16(a + 8 * i), vld1q_u16(b + 8 * i));
        two[i / 2].part[i % 2 * 2] = vreinterpretq_u32_u16(both.val[0]);
        two[i / 2].part[i % 2 * 2 + 1] = vreinterpretq_u32_u16(both.val[1]);
    }
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
    for (int64_t row = 0; row < 16; row += 4)
        for (int64_t word = 0; word < 16; word += 4) {
            uint32x4_t a[4];
            for (int i = 0; i < 4; ++i) a[i] = vld1q_u32(rows[row + i] + at + word);
            uint32x4x2_t low = vtrnq_u32(a[0], a[1]), high = vtrnq_u32(a[2], a[3]);
            for (int i = 0; i < 2; ++i) {
                uint32x4_t first =
                    vcombine_u32(vget_low_u32(low.val[i]), vget_low_u32(high.val[i]));
                uint32x4_t second =
                    vcombine_u32(vget_high_u32(low.val[i]), vget_high_u32(high.val[i]));
                vst1q_u32(to + (word + i) * stride + row, first);
                vst1q_u32(to + (word + i + 2) * stride + row, second);
            }
        }
}

#undef EACH

}  // namespace
