// XXH3-128 of inputs over 240 bytes, taken while they are copied.
//
// Eight 64-bit sums run over stripes of 64 bytes. Of a stripe's lane i, XORed with lane i of the
// stripe's key, the two halves are multiplied and added to sum i; the lane itself is added to its
// neighbour's sum, i ^ 1. The key of stripe n of a chunk is the secret from byte 8 n on; after 16
// stripes, a chunk, the sums are scrambled. The input's last 64 bytes are a stripe of their own,
// though some of them may have been in one before. At the end the sums are folded twice, with
// different parts of the secret, into the low and the high half.
//
// An instruction set brings, before this file: Lanes (eight of 64 bits), load, carry (load once,
// store, return; its parameter says whether the store goes past the caches), absorb, scramble,
// spill, and settle (which orders what went past the caches before later stores). Everything is in
// an unnamed namespace and uses no library: nothing compiled for this instruction set may be
// merged with another's.

#pragma once

#include <string.h>

#include "digest.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "lanes are read as they lie in memory");

namespace {

constexpr int64_t kStripe = 64, kStripes = 16, kChunk = kStripe * kStripes;
constexpr int64_t kScrambleAt = 128, kLastAt = 121, kLowAt = 11, kHighAt = 117;

// How far ahead the source is asked for: the hardware's own prefetching ends with a page.
constexpr int64_t kAhead = 2048;

constexpr uint64_t kWord1 = 0x9E3779B1u, kWord2 = 0x85EBCA77u, kWord3 = 0xC2B2AE3Du;
constexpr uint64_t kLong1 = 0x9E3779B185EBCA87u, kLong2 = 0xC2B2AE3D27D4EB4Fu,
                   kLong3 = 0x165667B19E3779F9u, kLong4 = 0x85EBCA77C2B2AE63u,
                   kLong5 = 0x27D4EB2F165667C5u, kMix = 0x165667919E3779F9u;

constexpr uint64_t kStart[8] = {kWord3, kLong1, kLong2, kLong3, kLong4, kWord2, kLong5, kWord1};

alignas(64) constexpr uint8_t kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

// The sums of everything but the last stripe, while it is copied.
template <bool kPast>
Lanes carry_all(const Copy& copy) {
    Lanes sums = load(kStart);
    const int64_t whole = (copy.bytes - 1) / kStripe * kStripe;
    int64_t at = 0;
    for (; at + kChunk <= whole; at += kChunk) {
        const int64_t ahead = at + kAhead + kChunk <= copy.bytes ? at + kAhead : at;
#pragma GCC unroll 16
        for (int64_t n = 0; n < kStripes; n++) {
            __builtin_prefetch(copy.from + ahead + kStripe * n);
            const int64_t here = at + kStripe * n;
            sums = absorb(sums, carry<kPast>(copy.from + here, copy.to + here), load(kSecret + 8 * n));
        }
        sums = scramble(sums, load(kSecret + kScrambleAt));
    }
    for (int64_t n = 0; at < whole; n++, at += kStripe)
        sums = absorb(sums, carry<kPast>(copy.from + at, copy.to + at), load(kSecret + 8 * n));
    memcpy(copy.to + whole, copy.from + whole, copy.bytes - whole);
    return sums;
}

inline uint64_t word(const uint8_t* p) {
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

uint64_t fold(const uint64_t* sums, const uint8_t* secret, uint64_t folded) {
    for (int i = 0; i < 8; i += 2) {
        unsigned __int128 product = sums[i] ^ word(secret + 8 * i);
        product *= sums[i + 1] ^ word(secret + 8 * i + 8);
        folded += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    folded = (folded ^ folded >> 37) * kMix;
    return folded ^ folded >> 32;
}

void put(uint8_t* digest, uint64_t value) {
    value = __builtin_bswap64(value);
    memcpy(digest, &value, sizeof value);
}

// The digest of `bytes` bytes, whose sums are of everything but the last stripe.
void conclude(Lanes sums, const uint8_t* block, int64_t bytes, uint8_t* digest) {
    Lanes last = load(block + bytes - kStripe);
    uint64_t spilled[8];
    spill(absorb(sums, last, load(kSecret + kLastAt)), spilled);
    const uint64_t length = (uint64_t)bytes;
    put(digest, fold(spilled, kSecret + kHighAt, ~(length * kLong2)));
    put(digest + 8, fold(spilled, kSecret + kLowAt, length * kLong1));
}

void copy_all(const Copy* copies, int64_t count, uint8_t* digests) {
    for (int64_t i = 0; i < count; i++, digests += 16) {
        const Copy& copy = copies[i];
        const bool aligned = (uintptr_t)copy.to % kStripe == 0;
        Lanes sums = aligned ? carry_all<true>(copy) : carry_all<false>(copy);
        settle();
        // From the copy: the source may have changed since most of these bytes were copied.
        conclude(sums, copy.to, copy.bytes, digests);
    }
}

// The sums with the stripes from `at`, where a chunk begins, to `end`.
Lanes absorb_stripes(Lanes sums, const uint8_t* block, int64_t at, int64_t end) {
    for (; at + kChunk <= end; at += kChunk) {
#pragma GCC unroll 16
        for (int64_t n = 0; n < kStripes; n++)
            sums = absorb(sums, load(block + at + kStripe * n), load(kSecret + 8 * n));
        sums = scramble(sums, load(kSecret + kScrambleAt));
    }
    for (int64_t n = 0; at < end; n++, at += kStripe)
        sums = absorb(sums, load(block + at), load(kSecret + 8 * n));
    return sums;
}

int64_t digest_some(Partial* partial, const uint8_t* block, int64_t bytes, int64_t here,
                    uint8_t* digest) {
    const int64_t whole = (bytes - 1) / kStripe * kStripe, at = partial->at;
    Lanes sums = load(at ? (const void*)partial->sums : kStart);
    if (here == bytes) {
        conclude(absorb_stripes(sums, block, at, whole), block, bytes, digest);
        partial->at = 0;
        return 1;
    }
    const int64_t end = (here < whole ? here : whole) / kChunk * kChunk;
    if (end > at) {
        spill(absorb_stripes(sums, block, at, end), partial->sums);
        partial->at = end;
    }
    return 0;
}

}  // namespace

#define BATON_COPIER(isa) {kDigestVersion, isa, copy_all, digest_some}
