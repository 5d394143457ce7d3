#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

namespace {

typedef __m512i Lanes;

inline Lanes load(const void* p) { return _mm512_loadu_si512(p); }
inline void spill(Lanes x, uint64_t* p) { _mm512_storeu_si512(p, x); }
inline void settle() { _mm_sfence(); }

template <bool kPast>
inline Lanes carry(const uint8_t* from, uint8_t* to) {
    Lanes data = load(from);
    __asm__("" : "+v"(data));  // from here on a value, and no place that could be read again
    if (kPast)
        _mm512_stream_si512((__m512i*)to, data);
    else
        _mm512_storeu_si512(to, data);
    return data;
}

inline Lanes absorb(Lanes sums, Lanes data, Lanes key) {
    key = _mm512_xor_si512(key, data);
    Lanes product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    Lanes neighbours = _mm512_shuffle_epi32(data, _MM_PERM_BADC);
    return _mm512_add_epi64(_mm512_add_epi64(sums, neighbours), product);
}

inline Lanes scramble(Lanes sums, Lanes key) {
    const Lanes factor = _mm512_set1_epi64(0x9E3779B1);
    sums = _mm512_xor_si512(_mm512_xor_si512(sums, _mm512_srli_epi64(sums, 47)), key);
    Lanes high = _mm512_mul_epu32(_mm512_srli_epi64(sums, 32), factor);
    return _mm512_add_epi64(_mm512_mul_epu32(sums, factor), _mm512_slli_epi64(high, 32));
}

}  // namespace

// after the lanes, which it needs
#include "xxh3.h"

extern "C" const Copier baton_copier_avx512 = BATON_COPIER("avx512");
#endif
