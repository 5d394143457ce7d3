// One instruction set's kernels. Everything is in an unnamed namespace and uses no library
// templates: nothing compiled for this instruction set may be merged with another's.

#pragma once

#include "attention.h"
#include "linear.h"
#include "rows.h"
#include "sampling.h"

namespace {

void layer_any(const Layer* l, const Step* s, int64_t index) {
    int64_t m = s->tokens, hidden = l->qkv.k, inner = l->down.k;
    int32_t dtype = s->dtype, threads = s->threads;
    rms_norm_any(s->x, l->input_norm, s->normed, m, hidden, s->eps, dtype, threads);
    linear_any(&l->qkv, s->normed, nullptr, s->qkv, m, 0, dtype, threads);
    rope_write_any(l, s, index);
    attend_any(l, s, index);
    linear_any(&l->o, s->attended, s->x, s->x, m, 0, dtype, threads);
    rms_norm_any(s->x, l->post_norm, s->normed, m, hidden, s->eps, dtype, threads);
    if (!gated_any(&l->gate_up, s->normed, s->inner, m, dtype, threads)) {
        linear_any(&l->gate_up, s->normed, nullptr, s->gate_up, m, 0, dtype, threads);
        silu_mul_any(s->gate_up, s->inner, m, inner, dtype, threads);
    }
    linear_any(&l->down, s->inner, s->x, s->x, m, 0, dtype, threads);
}

}  // namespace

#define BATON_KERNELS(isa)                                                                \
    {                                                                                     \
        kInterface, kVersion, isa, pack_any, embed_any, linear_any, rms_norm_any,         \
            silu_mul_any, angles, rope_write_any, attend_any, layer_any, draw             \
    }
