// Attention to a block of the context in tiles, for bf16: both products, of 32 rows at a time, so
// that scores and weights stay in the first cache. Keys and values are laid out as tiles of B once
// for all rows under their head.

#pragma once

#include "attention_frame.h"

namespace {

// Sums of rows first..first + rows, which the block weighs less.
inline void shrink_sums(Scratch& c, int64_t first, int64_t rows, int64_t width) {
    for (int64_t r = first; r < first + rows; ++r) {
        if (c.shrink[r] == 1.0f) continue;
        V16 shrink = set1(c.shrink[r]);
        for (int64_t d = r * width; d < (r + 1) * width; d += 16)
            store(c.segment.sums + d, mul(load(c.segment.sums + d), shrink));
    }
}

// Scores of rows first..first + rows, under the head of c.keys, to c.scores.
inline void score_in_tiles(const Walk& w, int64_t first, int64_t rows, int64_t tokens, Scratch& c) {
    int64_t words = words_of<Bf16>(w.s.head_dim);
    for (int64_t i = 0; i < tokens; i += 32)
        add_chunks(c.tiles, rows, {c.queries + first * words, words * 4, kTile * 4},
                   {c.keys + i, kContext * 4, kTile * kContext * 4}, words / kTile, c.scores + i,
                   kContext * 4, true, nothing);
}

// Their weighted sums, of c.weights under the head of c.values.
inline void weigh_in_tiles(const Walk& w, int64_t first, int64_t rows, int64_t tokens, Scratch& c) {
    for (int64_t d = 0; d < w.width; d += 32)
        add_chunks(c.tiles, rows, {c.weights, kContext * 4, kTile * 4},
                   {c.values + d, w.width * 4, kTile * w.width * 4}, tokens / 32,
                   c.segment.sums + first * w.width + d, w.width * 4, false, nothing);
}

// Rows are weighed one turn late, so that tiles and vectors do not wait for what the other has
// just written.
inline void attend_block_in_tiles(const Walk& w, const Context& block, Scratch& c) {
    int64_t tokens = rounded<Bf16>(block.count), late = 0, late_rows = 0;
    for (int64_t h = 0; h < w.item.heads; ++h) {
        int64_t begin = h * w.item.rows, end = begin + w.item.rows;
        lay_out_keys<Bf16>(w, block, h, tokens, c);
        for (int64_t first = begin; first < end; first += kBlock) {
            int64_t rows = end - first < kBlock ? end - first : kBlock;
            score_in_tiles(w, first, rows, tokens, c);
            if (late_rows) weigh_in_tiles(w, late, late_rows, tokens, c);
            if (first == begin) lay_out_values<Bf16>(w, block, h, tokens, c);
            raise_most(c, first, rows, c.scores, tokens, w.s.scale);
            shrink_sums(c, first, rows, w.width);
            soften<Bf16>(c, first, rows, c.scores, c.weights, tokens, w.s.scale);
            late = first;
            late_rows = rows;
        }
    }
    weigh_in_tiles(w, late, late_rows, tokens, c);
}

}  // namespace
