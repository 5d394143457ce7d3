// Attention to a block of the context for few rows under each KV head, as decoding has them, in
// tiles. K is multiplied as it lies in the pool: 16 of its tokens are a tile of A, and queries one
// of B. A product does not depend on the order of its factors, so scores have the bits that they
// have in attention_tiles.h; all other sums are the same as there.
//
// Reading K and V takes longer than all else, and memory is quickest in order of addresses, where a
// head's share of a token is a small piece. So everything is done for all heads before the next
// thing, and all the while memory is asked for what comes next, line after line: V while there is
// work on scores, the next block's K while there is work on V.

#pragma once

#include "attention_tiles.h"

namespace {

// Whether an item's rows are few, and 16 tokens of K are a tile where they lie: in one block of the
// pool, and a head's numbers in whole chunks.
inline bool is_few(const Walk& w) {
    return w.item.rows <= kTile && w.s.head_dim % kChunk == 0 && w.s.block_size % kTile == 0;
}

// The item's queries as words, to c.queries: [heads][words][rows].
inline void turn_queries(const Walk& w, Scratch& c) {
    int64_t dim = w.s.head_dim, words = dim / 2, rows = w.item.rows, token;
    int64_t row_width = (w.s.heads + 2 * w.s.kv_heads) * dim;
    for (int64_t r = 0; r < w.rows(); ++r) {
        int64_t head = w.query(r, &token);
        const uint16_t* q = (const uint16_t*)w.s.qkv + token * row_width + head * dim;
        uint32_t* to = c.queries + r / rows * rows * words + r % rows;
        for (int64_t i = 0; i < words; ++i) memcpy(to + i * rows, q + 2 * i, 4);
    }
}

// Asks memory for what comes next, for the second cache: V of the block's tokens under all heads,
// then K of the next block's.
class Asking {
public:
    Asking(const Walk& w, const Context& block)
        : row_(block.values), last_(block.values + block.count - 1), next_(block.ahead),
          end_(block.ahead + kContext - 1), bytes_(w.item.heads * w.s.head_dim * 2) {}

    // The next lines, of which there are more than are ever asked for: the last ones come again.
    __attribute__((always_inline)) void lines(int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            __builtin_prefetch((const char*)*row_ + at_, 0, 2);
            at_ += 64;
            if (at_ >= bytes_) advance();
        }
    }

private:
    __attribute__((always_inline)) void advance() {
        at_ = 0;
        if (row_ != last_) {
            ++row_;
        } else if (last_ != end_) {
            row_ = next_;
            last_ = end_;
        }
    }

    const void* const* row_;
    const void* const* last_;
    const void* const* next_;
    const void* const* end_;
    int64_t bytes_;
    int64_t at_ = 0;
};

// Of the 16 lines of V that go with a tile of K, so many are asked for while that is multiplied,
// and the others during the softmax, so that memory always has something to do. And of the 16 lines
// of K that go with a tile of V, so many while that is laid out, and the others while it is
// multiplied.
constexpr int64_t kWithScores = 12, kWithLayout = 8;

// K of 16 tokens of a block as a tile, under the item's first head. Of tokens that no row sees the
// pool may hold anything: their scores are not looked at. If none is seen, there may be no block.
struct KeyTile {
    const char* at = kZeros;
    int64_t stride = 0;

    KeyTile(const Walk& w, const Context& block, int64_t first) {
        for (int64_t i = 0; i < kTile; ++i) {
            if (block.keys[first + i] == kZeros) continue;
            stride = w.s.kv_heads * w.s.head_dim * 2;
            at = (const char*)block.keys[first + i] - i * stride;
            return;
        }
    }
};

// Scores of all rows with the block's tokens, to c.scores.
inline void score_few(const Walk& w, const Context& block, int64_t tokens, Asking& asking,
                      Scratch& c) {
    int64_t rows = w.item.rows, chunks = w.s.head_dim / kChunk;
    int64_t width = (w.rows() + 15) / 16 * 16;
    for (int64_t i = 0; i < tokens; i += kBlock) {
        KeyTile upper(w, block, i), lower(w, block, i + kTile);
        const uint32_t* queries = c.queries;
        float* to = c.by_token + i * width;
        for (int64_t h = 0; h < w.item.heads; ++h, to += rows) {
            TILE_ZERO(0);
            TILE_ZERO(1);
            for (int64_t chunk = 0; chunk < chunks; ++chunk, queries += kTile * rows) {
                TILE_LOAD(5, queries, rows * 4);
                TILE_LOAD(6, upper.at, upper.stride);
                asking.lines(kWithScores);
                TILE_DOT(0, 6, 5);
                TILE_LOAD(7, lower.at, lower.stride);
                asking.lines(kWithScores);
                TILE_DOT(1, 7, 5);
                upper.at += kChunk * 2;
                lower.at += kChunk * 2;
            }
            TILE_STORE(0, to, width * 4);
            TILE_STORE(1, to + kTile * width, width * 4);
        }
    }
    for (int64_t i = 0; i < tokens; i += kTile) {
        const uint32_t* by_token[kTile];
        for (int64_t j = 0; j < kTile; ++j)
            by_token[j] = (const uint32_t*)c.by_token + (i + j) * width;
        transpose(by_token, width, (uint32_t*)c.scores + i, kContext);
    }
}

// V of the block's tokens under head h as words, to c.values.
inline void lay_out_few(const Walk& w, const Context& block, int64_t h, int64_t tokens,
                        Asking& asking, Scratch& c) {
    int64_t dim = w.s.head_dim;
    uint32_t* words = c.values;
    for (int64_t i = 0; i < tokens; i += 2) {
        const uint16_t* pair[2] = {(const uint16_t*)block.values[i] + h * dim,
                                   (const uint16_t*)block.values[i + 1] + h * dim};
        for (int64_t d = 0; d < dim; d += 32, words += 32) {
            W16 two[2];
            Bf16::load_columns(pair, d, two);
            store_words(words, two[0]);
            store_words(words + 16, two[1]);
            asking.lines(kWithLayout / 8);
        }
    }
}

// Weighted sums of all rows.
inline void weigh_few(const Walk& w, const Context& block, int64_t tokens, Asking& asking,
                      Scratch& c) {
    int64_t dim = w.s.head_dim, rows = w.item.rows;
    for (int64_t h = 0; h < w.item.heads; ++h) {
        lay_out_few(w, block, h, tokens, asking, c);
        const uint32_t* weights = c.weights + h * rows * kContext;
        for (int64_t d = 0; d < dim; d += 32) {
            float* sums = c.segment.sums + h * rows * dim + d;
            TILE_LOAD(2, sums, dim * 4);
            TILE_LOAD(3, sums + kTile, dim * 4);
            for (int64_t i = 0; i < tokens; i += kChunk) {
                const uint32_t* values = c.values + i / 2 * dim + d;
                TILE_LOAD(4, weights + i / 2, kContext * 4);
                TILE_LOAD(6, values, dim * 4);
                asking.lines(16 - kWithLayout);
                TILE_DOT(2, 4, 6);
                TILE_LOAD(7, values + kTile, dim * 4);
                asking.lines(16 - kWithLayout);
                TILE_DOT(3, 4, 7);
            }
            TILE_STORE(2, sums, dim * 4);
            TILE_STORE(3, sums + kTile, dim * 4);
        }
    }
}

inline void attend_block_of_few(const Walk& w, const Context& block, Scratch& c) {
    int64_t tokens = rounded<Bf16>(block.count), rows = w.rows();
    int64_t tiles = w.item.heads * tokens * w.s.head_dim / (kTile * kChunk);  // of K
    int64_t with_softmax = tiles * (16 - kWithScores) / rows;
    Asking asking(w, block);
    c.tiles.set_few(w.item.rows);
    score_few(w, block, tokens, asking, c);
    raise_most(c, 0, rows, c.scores, tokens, w.s.scale);
    shrink_sums(c, 0, rows, w.width);
    soften<Bf16>(c, 0, rows, c.scores, c.weights, tokens, w.s.scale,
                 [&](int64_t) __attribute__((always_inline)) { asking.lines(with_softmax); });
    weigh_few(w, block, tokens, asking, c);
}

}  // namespace
