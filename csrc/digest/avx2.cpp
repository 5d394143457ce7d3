#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

namespace {

struct Lanes {
    __m256i low, high;
};

inline Lanes load(const void* p) {
    const __m256i* at = (const __m256i*)p;
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline void spill(Lanes x, uint64_t* p) {
    _mm256_storeu_si256((__m256i*)p, x.low);
    _mm256_storeu_si256((__m256i*)p + 1, x.high);
}
inline void settle() { _mm_sfence(); }

template <bool kPast>
inline Lanes carry(const uint8_t* from, uint8_t* to) {
    Lanes data = load(from);
    __asm__("" : "+x"(data.low), "+x"(data.high));  // values now, that cannot be read again
    if (kPast) {
        _mm256_stream_si256((__m256i*)to, data.low);
        _mm256_stream_si256((__m256i*)to + 1, data.high);
    } else {
        _mm256_storeu_si256((__m256i*)to, data.low);
        _mm256_storeu_si256((__m256i*)to + 1, data.high);
    }
    return data;
}

inline __m256i absorb_half(__m256i sums, __m256i data, __m256i key) {
    key = _mm256_xor_si256(key, data);
    __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    __m256i neighbours = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(_mm256_add_epi64(sums, neighbours), product);
}
inline Lanes absorb(Lanes sums, Lanes data, Lanes key) {
    return {absorb_half(sums.low, data.low, key.low), absorb_half(sums.high, data.high, key.high)};
}

inline __m256i scramble_half(__m256i sums, __m256i key) {
    const __m256i factor = _mm256_set1_epi64x(0x9E3779B1);
    sums = _mm256_xor_si256(_mm256_xor_si256(sums, _mm256_srli_epi64(sums, 47)), key);
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(sums, 32), factor);
    return _mm256_add_epi64(_mm256_mul_epu32(sums, factor), _mm256_slli_epi64(high, 32));
}
inline Lanes scramble(Lanes sums, Lanes key) {
    return {scramble_half(sums.low, key.low), scramble_half(sums.high, key.high)};
}

}  // namespace

// after the lanes, which it needs
#include "xxh3.h"

extern "C" const Copier baton_copier_avx2 = BATON_COPIER("avx2");
#endif
