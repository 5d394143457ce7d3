// The C ABI of Baton's CPU kernels: raw pointers and sizes, one table of functions per instruction
// set. No torch headers, so that one build serves every torch.
//
// Exactness. Every function computes each row (token) of its output by itself: the order in which
// a sum is formed depends on the row's own data and position only, never on how many rows there
// are, on where a row stands among them, or on the number of threads.
//
// Types. `dtype` is kBf16 or kFp32 and holds for activations, weights and KV alike; arithmetic is
// in fp32. Strides and offsets are in elements and 64 bits wide.

#pragma once

#include <stdint.h>

constexpr int32_t kBf16 = 0, kFp32 = 1;

// A weight matrix [n, k] as `pack` writes it: panels of 32 output columns, ceil(n / 32) of them;
// a panel is a run of 32-bit words [steps][32], a word being one fp32 or a pair of bf16 that are
// neighbours along k (steps = k or ceil(k / 2)). What is beyond n and k is zero.
constexpr int64_t kPanel = 32;

struct Linear {
    const void* weight;  // packed
    const void* bias;    // [n] or null
    int64_t n;
    int64_t k;
};

struct Layer {
    const void* input_norm;  // [hidden]
    Linear qkv;
    const void* q_norm;  // [head_dim] or null
    const void* k_norm;
    Linear o;
    const void* post_norm;  // [hidden]
    Linear gate_up;         // n = 2 * inner, gate first
    Linear down;
    int64_t window;  // a token sees so many of the last tokens, itself included; 0: all
};

// One forward pass of T tokens of B sequences, and the memory it works in.
struct Step {
    int64_t tokens;     // T
    int64_t sequences;  // B
    const int64_t* slots;         // [T] block * block_size + offset
    const int64_t* query_starts;  // [B + 1]
    const int64_t* context_lens;  // [B], these tokens included
    const int64_t* tables;        // [B, max_blocks]
    int64_t max_blocks;
    const float* cos;  // [T, head_dim / 2]
    const float* sin;

    void* kv;  // [num_blocks, layers, 2, block_size, kv_heads, head_dim]
    int64_t block_stride;
    int64_t block_size;

    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    float scale;
    float eps;

    void* x;         // [T, hidden], in and out
    void* normed;    // [T, hidden]
    void* qkv;       // [T, (heads + 2 kv_heads) * head_dim]
    void* attended;  // [T, heads * head_dim]
    void* gate_up;   // [T, 2 * inner]
    void* inner;     // [T, inner]

    int32_t dtype;
    int32_t threads;
};

// One draw of a token.
struct Draw {
    int64_t row;         // of the logits
    double largest;      // of these logits, finite
    double temperature;  // above 0
    double top_p;        // above 0; 1 and more: off
    double min_p;        // 0: off
    int64_t top_k;       // 0: off
    uint64_t seed;
    uint64_t choice;
    int64_t position;
};

// Raised with every change of this header that a caller would notice; above every version that
// once stood in its place.
constexpr int64_t kInterface = 3;
// Raised with every change of any result's bits. It is part of the name of the numerics, so that
// blocks of KV computed before and after do not answer for each other.
constexpr int64_t kVersion = 2;

struct Kernels {
    int64_t interface;
    int64_t version;
    const char* isa;
    // src [n, k] to packed dst; dst == src is allowed when n % 32 == 0 and k % 2 == 0.
    void (*pack)(const void* src, void* dst, int64_t n, int64_t k, int32_t dtype, int32_t threads);
    // Rows `ids` [m] of a packed matrix [n, k], to y [m, k].
    void (*embed)(const void* packed, const int64_t* ids, void* y, int64_t m, int64_t k,
                  int32_t dtype);
    // y [m, n] = x [m, k] w^T (+ bias) (+ residual [m, n], which may be y). x and y are dense;
    // y is fp32 if `wide`, else of `dtype`.
    void (*linear)(const Linear* w, const void* x, const void* residual, void* y, int64_t m,
                   int32_t wide, int32_t dtype, int32_t threads);
    void (*rms_norm)(const void* x, const void* weight, void* y, int64_t m, int64_t n, float eps,
                     int32_t dtype, int32_t threads);
    // y [m, inner] = silu(gate) * up, where x [m, 2 * inner] holds gate, then up.
    void (*silu_mul)(const void* x, void* y, int64_t m, int64_t inner, int32_t dtype,
                     int32_t threads);
    // cos and sin [m, half] of positions x frequencies (fp32 product), times `factor`.
    void (*angles)(const float* frequencies, const int64_t* positions, float factor, float* cos,
                   float* sin, int64_t m, int64_t half, int32_t threads);
    // Of step->qkv: norm (if any) and rotate Q in place; norm and rotate K and store it with V.
    void (*rope_write)(const Layer* layer, const Step* step, int64_t index);
    // step->attended from step->qkv (Q) and the KV pool, which holds these tokens already.
    void (*attend)(const Layer* layer, const Step* step, int64_t index);
    // The whole decoder layer `index`, in and out through step->x.
    void (*layer)(const Layer* layer, const Step* step, int64_t index);
    // The tokens of `count` draws from rows [vocab] of logits, `stride` apart, without NaN or
    // infinity but negative; -1 where rounding could decide (see sampling.h).
    void (*draw)(const float* logits, int64_t stride, int64_t vocab, const Draw* draws,
                 int64_t* tokens, int64_t count, int32_t threads);
};

// The table for an instruction set ("avx512amx", "avx512bf16", "avx512", "avx2", "neon",
// "portable"); null if this processor or this build does not have it, or this process may not use
// it.
extern "C" __attribute__((visibility("default"))) const Kernels* baton_kernels(const char* isa);

extern "C" {
extern const Kernels baton_avx512amx, baton_avx512bf16, baton_avx512, baton_avx2, baton_neon,
    baton_portable;
}
