// Vectors of 16 lanes on AVX2 with FMA: pairs of registers. The same arithmetic, lane for lane, as
// on AVX-512 without bf16 dot products.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

struct V16 {
    __m256 a, b;
};
struct W16 {
    __m256i a, b;
};

// Register tiles: rows x (kVectors * 16) columns for products, rows x (kWide * 16) for P V.
constexpr int kVectors = 1, kRows = 5, kBusyRows = 4, kWide = 2, kWideRows = 2;

// A register of doubles, with the compiler's own operators.
typedef __m256d Doubles;
inline Doubles fma(Doubles x, Doubles y, Doubles z) { return _mm256_fmadd_pd(x, y, z); }
// A bit for each lane, set where the number's sign is.
inline uint32_t signs(Doubles x) { return (uint32_t)_mm256_movemask_pd(x); }

inline V16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
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
inline V16 add(V16 x, V16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V16 sub(V16 x, V16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V16 mul(V16 x, V16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V16 div(V16 x, V16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V16 fma(V16 x, V16 y, V16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
// The second operand if either is NaN.
inline V16 max(V16 x, V16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V16 min(V16 x, V16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
// y where limit <= x or x is NaN, else 0.
inline V16 zero_below(V16 limit, V16 x, V16 y) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_NLT_UQ), y.a),
            _mm256_and_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_NLT_UQ), y.b)};
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
    __m256 half = _mm256_add_ps(x.a, x.b);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float max_lanes(V16 x) {
    __m256 half = _mm256_max_ps(x.a, x.b);
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

inline W16 load_words(const uint32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
inline void store_words(uint32_t* p, W16 x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
inline W16 as_words(V16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline V16 as_floats(W16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline V16 low_bf16(W16 x) {
    return as_floats({_mm256_slli_epi32(x.a, 16), _mm256_slli_epi32(x.b, 16)});
}
inline V16 high_bf16(W16 x) {
    __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
    return as_floats({_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)});
}
inline __m256 power_of_two(__m256 shifted) {
    __m256i biased = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
// 2^n for the integers in a sum x + kRound (see exp16).
inline V16 power_of_two(V16 x) { return {power_of_two(x.a), power_of_two(x.b)}; }

inline __m256 widen(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline V16 load(const uint16_t* p) {
    return {widen(_mm_loadu_si128((const __m128i*)p)),
            widen(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline V16 load_some(const uint16_t* p, int64_t n) {
    uint16_t all[16] = {};
    memcpy(all, p, (size_t)n * 2);
    return load(all);
}
// To nearest, ties to even; NaN stays NaN.
inline __m256i rounded(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}
inline void store(uint16_t* p, V16 x) {
    __m256i packed = _mm256_packus_epi32(rounded(x.a), rounded(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
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
inline __m256i interleave_8(const uint16_t* a, const uint16_t* b) {
    __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)a));
    __m256i y = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)b));
    return _mm256_or_si256(x, _mm256_slli_epi32(y, 16));
}
// Words of (a, b) for 32 neighbours.
inline void interleave_32(const uint16_t* a, const uint16_t* b, W16* two) {
    for (int i = 0; i < 2; ++i)
        two[i] = {interleave_8(a + 16 * i, b + 16 * i),
                  interleave_8(a + 16 * i + 8, b + 16 * i + 8)};
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
