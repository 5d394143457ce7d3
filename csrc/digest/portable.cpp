#include <stdint.h>
#include <string.h>

namespace {

struct Lanes {
    uint64_t at[8];
};

inline Lanes load(const void* p) {
    Lanes x;
    memcpy(&x, p, sizeof x);
    return x;
}
inline void spill(Lanes x, uint64_t* p) { memcpy(p, &x, sizeof x); }
inline void settle() {}

template <bool kPast>
inline Lanes carry(const uint8_t* from, uint8_t* to) {
    Lanes data = load(from);
    __asm__("" : "+m"(data));  // our own from here on: the source cannot be read again for it
    memcpy(to, &data, sizeof data);
    return data;
}

inline Lanes absorb(Lanes sums, Lanes data, Lanes key) {
    for (int i = 0; i < 8; i++) {
        const uint64_t mixed = data.at[i] ^ key.at[i];
        sums.at[i] += (mixed & 0xFFFFFFFF) * (mixed >> 32) + data.at[i ^ 1];
    }
    return sums;
}

inline Lanes scramble(Lanes sums, Lanes key) {
    for (int i = 0; i < 8; i++)
        sums.at[i] = (sums.at[i] ^ sums.at[i] >> 47 ^ key.at[i]) * 0x9E3779B1u;
    return sums;
}

}  // namespace

// after the lanes, which it needs
#include "xxh3.h"

extern "C" const Copier baton_copier_portable = BATON_COPIER("portable");
