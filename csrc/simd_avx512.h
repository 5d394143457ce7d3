// Vectors of 16 lanes on AVX-512, with bf16 dot products where the target has them.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

typedef __m512 V16;
typedef __m512i W16;  // 16 words of 32 bits

// Register tiles: rows x (kVectors * 16) columns for products, rows x (kWide * 16) for P V.
// Under kBusyRows rows a tile has too few sums to keep the units busy.
constexpr int kVectors = 2, kWide = 4, kWideRows = 6;
#ifdef __AVX512BF16__
constexpr int kRows = 14, kBusyRows = 6;
#else
constexpr int kRows = 12, kBusyRows = 4;
#endif

// A register of doubles, with the compiler's own operators.
typedef __m512d Doubles;
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
// A bit for each lane, set where the number's sign is.
inline uint32_t signs(Doubles x) { return _mm512_movepi64_mask(_mm512_castpd_si512(x)); }

inline V16 set1(float x) { return _mm512_set1_ps(x); }
inline V16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V16 x) { _mm512_storeu_ps(p, x); }
inline __mmask16 first(int64_t n) { return (__mmask16)((1u << n) - 1); }
inline V16 load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store_some(float* p, V16 x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
inline V16 add(V16 a, V16 b) { return _mm512_add_ps(a, b); }
inline V16 sub(V16 a, V16 b) { return _mm512_sub_ps(a, b); }
inline V16 mul(V16 a, V16 b) { return _mm512_mul_ps(a, b); }
inline V16 div(V16 a, V16 b) { return _mm512_div_ps(a, b); }
inline V16 fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand if either is NaN.
inline V16 max(V16 a, V16 b) { return _mm512_max_ps(a, b); }
inline V16 min(V16 a, V16 b) { return _mm512_min_ps(a, b); }
// x where limit <= x or x is NaN, else 0.
inline V16 zero_below(V16 limit, V16 x, V16 y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);
}
// x in lanes from <= i < to, else `other`.
inline V16 keep(V16 x, int64_t from, int64_t to, V16 other) {
    __mmask16 mask = (__mmask16)(((1u << to) - 1) & ~((1u << from) - 1));
    return _mm512_mask_mov_ps(other, mask, x);
}

// The sum of all lanes, as a tree: lane i with i + 8, then + 4, + 2, + 1.
inline float sum_lanes(V16 x) {
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float max_lanes(V16 x) {
    __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

inline W16 load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store_words(uint32_t* p, W16 x) { _mm512_storeu_si512(p, x); }
inline V16 as_floats(W16 x) { return _mm512_castsi512_ps(x); }
inline W16 as_words(V16 x) { return _mm512_castps_si512(x); }
inline V16 low_bf16(W16 x) { return as_floats(_mm512_slli_epi32(x, 16)); }
inline V16 high_bf16(W16 x) {
    return as_floats(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000u)));
}
// 2^n for the integers in a sum x + kRound (see exp16).
inline V16 power_of_two(V16 shifted) {
    return as_floats(
        _mm512_slli_epi32(_mm512_add_epi32(as_words(shifted), _mm512_set1_epi32(127)), 23));
}

inline V16 widen(__m256i x) { return low_bf16(_mm512_cvtepu16_epi32(x)); }
inline V16 load(const uint16_t* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline V16 load_some(const uint16_t* p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
}
// To nearest, ties to even; NaN stays NaN.
inline __m256i narrow(V16 x) {
    W16 bits = as_words(x);
    W16 odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    W16 rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    W16 quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    W16 chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}
inline void store(uint16_t* p, V16 x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
inline void store_some(uint16_t* p, V16 x, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(x));
}

// Of numbers that are normal or 0: rounds as `store` does, and returns what was stored.
inline V16 store_narrow(uint16_t* p, V16 x) {
#ifdef __AVX512BF16__
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m256i rounded = narrow(x);
#endif
    _mm256_storeu_si256((__m256i*)p, rounded);
    return widen(rounded);
}
// Words of (a, b) for 32 neighbours.
inline void interleave_32(const uint16_t* a, const uint16_t* b, W16* two) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    W16 x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    two[0] = _mm512_permutex2var_epi16(x, low, y);
    two[1] = _mm512_permutex2var_epi16(x, _mm512_add_epi16(low, _mm512_set1_epi16(16)), y);
}

// Products of 16 pairs of bf16 with one pair, both added.
inline V16 dot_pairs(V16 sum, uint32_t x, W16 w) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)w);
#else
    float even, odd;
    uint32_t low = x << 16, high = x & 0xffff0000u;
    memcpy(&even, &low, 4);
    memcpy(&odd, &high, 4);
    return fma(set1(odd), high_bf16(w), fma(set1(even), low_bf16(w), sum));
#endif
}

inline void transpose_16(const uint32_t* const* rows, int64_t at, uint32_t* to, int64_t stride) {
    W16 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load_words(rows[i] + at);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        store_words(to + i * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        store_words(to + (i + 8) * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}

}  // namespace
