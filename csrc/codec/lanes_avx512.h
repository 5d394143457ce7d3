// Sixteen elements at a time, for the codecs whose loops the compiler does not make good vectors of:
// element, code and product are of three sizes there.
//
// Each does to every lane what the plain loop of the same name does to one element.

#pragma once

#include <immintrin.h>

#include "types.h"

#define BATON_LANES 1

namespace {

typedef __m512 Lanes;
constexpr int64_t kLanes = 16;

// Which elements count, and their magnitudes; the limit is that of their type.
inline __m256i magnitudes(__m256i bits) {
    __m256i size = _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff));
    return _mm256_maskz_mov_epi16(
        _mm256_cmplt_epu16_mask(size, _mm256_set1_epi16((short)Bf16::kLimit)), size);
}
inline __m512i magnitudes(__m512i bits) {
    __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    return _mm512_maskz_mov_epi32(
        _mm512_cmplt_epu32_mask(size, _mm512_set1_epi32((int)Fp32::kLimit)), size);
}

inline Lanes elements(const uint16_t* x) {
    __m256i bits = _mm256_loadu_si256((const __m256i*)x);
    __m256i size = _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff));
    __mmask16 counts = _mm256_cmplt_epu16_mask(size, _mm256_set1_epi16((short)Bf16::kLimit));
    __m512i wide = _mm512_cvtepu16_epi32(bits);
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(counts, wide, 16));
}
inline Lanes elements(const uint32_t* x) {
    __m512i bits = _mm512_loadu_si512(x);
    __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    __mmask16 counts = _mm512_cmplt_epu32_mask(size, _mm512_set1_epi32((int)Fp32::kLimit));
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(counts, bits));
}

inline Lanes lanes_of(Same parameter, int64_t) { return _mm512_set1_ps(parameter.value); }
inline Lanes lanes_of(const float* parameters, int64_t at) { return _mm512_loadu_ps(parameters + at); }

// The integers that x is rounded to, by their low bytes.
inline void store_codes(uint8_t* codes, Lanes x) {
    __m512i bits = _mm512_castps_si512(_mm512_add_ps(x, _mm512_set1_ps(kRound)));
    _mm_storeu_si128((__m128i*)codes, _mm512_cvtepi32_epi8(bits));
}
inline Lanes load_codes(const uint8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes)));
}

inline void store_elements(uint16_t* x, Lanes values) {
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    _mm256_storeu_si256((__m256i*)x, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}
inline void store_elements(uint32_t* x, Lanes values) { _mm512_storeu_ps(x, values); }

// The greatest magnitudes of 16 neighbouring columns.
inline void most_of_lanes(const uint16_t* x, int64_t rows, int64_t stride, uint16_t* most) {
    __m256i found = _mm256_setzero_si256();
    for (int64_t row = 0; row < rows; ++row)
        found = _mm256_max_epu16(
            found, magnitudes(_mm256_loadu_si256((const __m256i*)(x + row * stride))));
    _mm256_storeu_si256((__m256i*)most, found);
}
inline void most_of_lanes(const uint32_t* x, int64_t rows, int64_t stride, uint32_t* most) {
    __m512i found = _mm512_setzero_si512();
    for (int64_t row = 0; row < rows; ++row)
        found = _mm512_max_epu32(found, magnitudes(_mm512_loadu_si512(x + row * stride)));
    _mm512_storeu_si512(most, found);
}

// The greatest magnitude of n elements, a multiple of 16.
inline uint16_t most_in_lanes(const uint16_t* x, int64_t n) {
    __m256i found = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += kLanes)
        found =
            _mm256_max_epu16(found, magnitudes(_mm256_loadu_si256((const __m256i*)(x + i))));
    __m128i half =
        _mm_max_epu16(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
    // There is an instruction for the least of eight.
    __m128i least = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
    return (uint16_t)~_mm_cvtsi128_si32(least);
}
inline uint32_t most_in_lanes(const uint32_t* x, int64_t n) {
    __m512i found = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += kLanes)
        found = _mm512_max_epu32(found, magnitudes(_mm512_loadu_si512(x + i)));
    return _mm512_reduce_max_epu32(found);
}

}  // namespace
