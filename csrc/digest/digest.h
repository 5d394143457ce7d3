// The C ABI of the fabric's copies: blocks are copied and digested in one pass, many in one call;
// or sent from where they lie, and digested where they are received.
//
// A library of its own beside the kernels': it needs no OpenMP, so it loads where there is no
// torch, and nothing in it touches a number that a model computes.
//
// The digest is XXH3-128 with seed 0 and the default secret, in its canonical (big-endian) form,
// bit for bit that of the `xxhash` package. It is that of the bytes that were *stored*: each
// stripe is loaded once, into a register that the compiler cannot look behind, and this register
// is what is stored and what is digested. So a source that changes meanwhile can give a copy that
// is neither the old nor the new content, but never a copy that its digest does not describe.

#pragma once

#include <stdint.h>

// Shorter inputs are digested by another rule, which is not here.
constexpr int64_t kShortest = 241;

// One block. `to` and `from` have `bytes` bytes, at least kShortest, with any alignment.
struct Copy {
    uint8_t* to;
    const uint8_t* from;
    int64_t bytes;
};

// How far the digest of a block that is still arriving has come. All zeros at first.
struct Partial {
    uint64_t sums[8];
    int64_t at;
};

// A piece of memory to send from, or to receive into.
struct Piece {
    uint8_t* at;
    int64_t bytes;
};

// Raised with every change of this header.
constexpr int64_t kDigestVersion = 2;

struct Copier {
    int64_t version;
    const char* isa;
    // digests [count][16]. When it returns, other threads see what was copied.
    void (*copy)(const Copy* copies, int64_t count, uint8_t* digests);
    // Of a block of `bytes` (at least kShortest), which stays as it is, the first `here` have
    // come. Takes up what can be; when all are here, writes the digest and returns 1.
    int64_t (*digest_some)(Partial* partial, const uint8_t* block, int64_t bytes, int64_t here,
                           uint8_t* digest);
};

// The table for an instruction set ("avx512", "avx2", "portable"); null if this processor does not
// have it, or this build does not.
extern "C" __attribute__((visibility("default"))) const Copier* baton_copier(const char* isa);

// Blocks over a connected stream socket, without a copy of ours on either side. Both wait in
// poll, until the instant `deadline_ns` of CLOCK_MONOTONIC, and return 0, or the number of the
// error; ETIMEDOUT is also what the deadline gives. Interrupted, they go on.

// Sends all pieces, in order, and nothing between them.
extern "C" __attribute__((visibility("default"))) int64_t baton_send(int fd, const Piece* pieces,
                                                                     int64_t count,
                                                                     int64_t deadline_ns);

// Fills all pieces, in order. digests [count][16]: of each piece of at least kShortest bytes that
// is full. *num_full: how many are, also after an error. *low_water: the socket's SO_RCVLOWAT as
// it was set last, here or by the caller. The end of the stream is ECONNRESET.
extern "C" __attribute__((visibility("default"))) int64_t baton_receive(
    const Copier* copier, int fd, const Piece* pieces, int64_t count, int64_t deadline_ns,
    int32_t* low_water, uint8_t* digests, int64_t* num_full);

extern "C" {
extern const Copier baton_copier_avx512, baton_copier_avx2, baton_copier_portable;
}
