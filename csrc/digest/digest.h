// The C ABI of the fabric's copies: blocks are copied and digested in one pass, many in one call.
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

// Raised with every change of this header.
constexpr int64_t kDigestVersion = 1;

struct Copier {
    int64_t version;
    const char* isa;
    // digests [count][16]. When it returns, other threads see what was copied.
    void (*copy)(const Copy* copies, int64_t count, uint8_t* digests);
};

// The table for an instruction set ("avx512", "avx2", "portable"); null if this processor does not
// have it, or this build does not.
extern "C" __attribute__((visibility("default"))) const Copier* baton_copier(const char* isa);

extern "C" {
extern const Copier baton_copier_avx512, baton_copier_avx2, baton_copier_portable;
}
