// What attention works on: an item of work, the context it walks, and the memory it works in.

#pragma once

#include "linear.h"
#include "rows.h"

namespace {

constexpr int64_t kContext = 64, kSegment = 512, kMaxDim = 256;
// Query rows of an item.
#ifdef __AMX_BF16__
constexpr int64_t kTileRows = 128;
#else
constexpr int64_t kTileRows = 64;
#endif
// Whether products are done in tiles, which want whole chunks: of tokens and of a head's numbers.
template <class T>
constexpr bool kInTiles = false;
#ifdef __AMX_BF16__
template <>
constexpr bool kInTiles<Bf16> = true;
#endif
// Where a running maximum begins. Finite, so that no difference of two is NaN.
constexpr float kLeast = -1e30f;
constexpr float kLog2E = 1.44269504f;  // e^x = 2^(x log2 e)
// K or V of tokens that no row sees, under any number of heads.
alignas(64) const char kZeros[kTileRows * kMaxDim * 4] = {};

// Softmax over a part of the context: maximum (of scores as powers of 2), sum of weights, weighted
// sum of V, of each row.
struct Running {
    float most[kTileRows];
    float total[kTileRows];
    float sums[kTileRows * kMaxDim];  // [rows][width]
};

// What one item works in; about half a megabyte. Matrices come first, so that vectors of theirs are
// whole lines.
struct alignas(64) Scratch {
    uint32_t keys[kContext * kMaxDim];  // [words of a key][kContext]
    uint32_t values[kContext * kMaxDim];  // words of tokens [kContext / kPack][width]
    float scores[kTileRows * kContext];
    uint32_t weights[kTileRows * kContext];  // words of tokens [rows][kContext]
    uint32_t queries[kTileRows * kMaxDim];
    Running segment;
    Running whole;
    float next[kTileRows];    // maximum with this block
    float shrink[kTileRows];  // what that makes of the weights so far
    float added[kTileRows];   // sum of this block's weights
    int64_t from[kTileRows];  // what of this block the row sees
    int64_t to[kTileRows];
#ifdef __AMX_BF16__
    alignas(64) float by_token[kContext * kTileRows];  // scores before they are turned to rows
    Tiles tiles;
#endif
};

struct Item {
    int64_t sequence;
    int64_t first_row;  // row = token * group + head within the group
    int64_t rows;       // under each KV head; heads * rows <= kTileRows
    int64_t kv_head;
    int64_t heads;
    int64_t first_segment;
    int64_t last_segment;  // exclusive
    int64_t partial;  // where the softmax of segment 0 goes, if others walk segments too; or -1
};

// An item with what is the same for all of its blocks.
struct Walk {
    const Layer& layer;
    const Step& s;
    int64_t index;
    Item item;
    int64_t width;  // of V: dim, rounded up to 32
    int64_t group;
    int64_t start;   // first token of the sequence in the batch
    int64_t before;  // tokens of the sequence before this batch
    int64_t seen;    // first position that any row sees
    int64_t end;     // behind the last

    Walk(const Layer& layer, const Step& s, int64_t index, const Item& item)
        : layer(layer), s(s), index(index), item(item), width((s.head_dim + 31) / 32 * 32),
          group(s.heads / s.kv_heads), start(s.query_starts[item.sequence]) {
        before = s.context_lens[item.sequence] - (s.query_starts[item.sequence + 1] - start);
        int64_t first = position(0);
        seen = layer.window && first >= layer.window ? first - layer.window + 1 : 0;
        end = position(item.rows - 1) + 1;
    }
    int64_t rows() const { return item.rows * item.heads; }
    int64_t first_block() const { return seen / kContext * kContext; }
    int64_t position(int64_t row) const { return before + (item.first_row + row) / group; }
    // Where row r (of all heads) stands among the query heads of the batch.
    int64_t query(int64_t r, int64_t* token) const {
        int64_t row = item.first_row + r % item.rows;
        *token = start + row / group;
        return (item.kv_head + r / item.rows) * group + row % group;
    }
    // Where K of tokens first..last lies, under the first KV head of the item.
    template <class Value>
    void find(int64_t first, int64_t last, const void** keys) const {
        const int64_t* table = s.tables + item.sequence * s.max_blocks + first / s.block_size;
        int64_t step = s.kv_heads * s.head_dim, offset = first % s.block_size;
        while (first < last) {
            const Value* key = key_at<Value>(s, index, *table++, offset);
            key += item.kv_head * s.head_dim;
            for (; offset < s.block_size && first < last; ++offset, ++first, key += step)
                *keys++ = key;
            offset = 0;
        }
    }
    int64_t to_value() const { return s.block_size * s.kv_heads * s.head_dim; }
};

// A block of the context: tokens 0..count from a multiple of kContext on, and those of the block
// that follows; after the last one comes the first of the item that follows.
struct Context {
    int64_t count;
    // K and V of each token, under the item's first KV head; zeros where no row sees any.
    const void* keys[kContext];
    const void* values[kContext];
    const void* ahead[kContext];  // K
    int64_t heads;
    int64_t dim;

    template <class Value>
    void begin(const Walk& w, const Walk& next, int64_t block) {
        heads = w.item.heads;
        dim = w.s.head_dim;
        find<Value>(w, block);
        advance<Value>(w, next, block);
    }
    // To `block`, of which `ahead` tells.
    template <class Value>
    void advance(const Walk& w, const Walk& next, int64_t block) {
        memcpy(keys, ahead, sizeof(keys));
        for (int64_t i = 0; i < kContext; ++i) {
            const Value* key = (const Value*)keys[i];
            values[i] = keys[i] == kZeros ? key : key + w.to_value();
        }
        count = w.end - block < kContext ? w.end - block : kContext;
        if (block + kContext < w.end)
            find<Value>(w, block + kContext);
        else
            find<Value>(next, next.first_block());
    }
    // While head h works on token i, ask memory for what the next head wants there: near enough
    // to be in the first cache still, and little by little, since a core keeps few misses at once.
    // (Always inline: to a compiler, a function that only prefetches does nothing.)
    template <class Value>
    __attribute__((always_inline)) void ask(int64_t h, int64_t i, int64_t offset) const {
        const Value* key = h + 1 < heads ? (const Value*)keys[i] + (h + 1) * dim
                                         : (const Value*)ahead[i];
        __builtin_prefetch(key + offset);
    }

private:
    template <class Value>
    void find(const Walk& w, int64_t block) {
        for (const void*& key : ahead) key = kZeros;
        int64_t first = w.seen > block ? w.seen : block;
        int64_t last = w.end < block + kContext ? w.end : block + kContext;
        w.find<Value>(first, last, ahead + (first - block));
    }
};

inline void clear(Running& x, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        x.most[r] = kLeast;
        x.total[r] = 0;
    }
    memset(x.sums, 0, (size_t)(rows * width) * 4);
}

// So many tokens of a block are computed with, for `count` that any row sees.
template <class T>
inline int64_t rounded(int64_t count) {
    constexpr int64_t kUnit = kInTiles<T> ? 32 : 16;
    return (count + kUnit - 1) / kUnit * kUnit;
}

// Words of a query, and of a key.
template <class T>
inline int64_t words_of(int64_t dim) {
    int64_t steps = steps_of<T>(dim);
    return kInTiles<T> ? (steps + 15) / 16 * 16 : steps;
}

// Words of the block's keys under head h, to c.keys.
template <class T>
inline void lay_out_keys(const Walk& w, const Context& block, int64_t h, int64_t tokens,
                         Scratch& c) {
    typedef typename T::Value Value;
    for (int64_t i = 0; i < tokens; i += 16) {
        const uint32_t* keys[16];
        for (int64_t j = 0; j < 16; ++j) {
            keys[j] = (const uint32_t*)((const Value*)block.keys[i + j] + h * w.s.head_dim);
            for (int64_t d = 0; d < w.s.head_dim; d += 64 / (int64_t)sizeof(Value))
                block.ask<Value>(h, i + j, d);
        }
        transpose(keys, steps_of<T>(w.s.head_dim), c.keys + i, kContext);
    }
}

// V of the block's tokens under head h as words, to c.values.
template <class T>
inline void lay_out_values(const Walk& w, const Context& block, int64_t h, int64_t tokens,
                           Scratch& c) {
    typedef typename T::Value Value;
    int64_t dim = w.s.head_dim;
    for (int64_t i = 0; i < tokens; i += T::kPack) {
        const Value* rows[T::kPack];
        Value padded[T::kPack][kMaxDim];
        for (int64_t j = 0; j < T::kPack; ++j) {
            rows[j] = (const Value*)block.values[i + j] + h * dim;
            for (int64_t d = 0; d < dim; d += 64 / (int64_t)sizeof(Value))
                block.ask<Value>(h, i + j, w.to_value() + d);
            if (dim % 32) {
                memset(padded[j] + dim / 32 * 32, 0, 32 * sizeof(Value));
                memcpy(padded[j], rows[j], (size_t)dim * sizeof(Value));
                rows[j] = padded[j];
            }
        }
        for (int64_t d = 0; d < dim; d += 32) {
            W16 two[2];
            T::load_columns(rows, d, two);
            store_words(c.values + i / T::kPack * w.width + d, two[0]);
            store_words(c.values + i / T::kPack * w.width + d + 16, two[1]);
        }
    }
}

// Rows first..first + rows of an item: the maximum with this block of `count` scores a row
// ([rows][kContext], not scaled yet), and what it makes of the weights so far.
inline void raise_most(Scratch& c, int64_t first, int64_t rows, const float* scores, int64_t count,
                       float scale) {
    V16 scales = set1(scale * kLog2E), hidden = set1(-INFINITY);
    for (int64_t r = 0; r < rows; ++r) {
        int64_t from = c.from[first + r], to = c.to[first + r];
        V16 most = hidden;
        for (int64_t i = 0; i < count; i += 16) {
            V16 score = load(scores + r * kContext + i);
            if (i < from || i + 16 > to)
                score = keep(score, within_16(from - i), within_16(to - i), hidden);
            most = max(most, score);
        }
        c.next[first + r] = max_lanes(most);
    }
    float* so_far = c.segment.most + first;
    for (int64_t r = 0; r < rows; r += 16) {
        V16 before = load_up_to(so_far + r, rows - r);
        V16 next = max(before, mul(load_up_to(c.next + first + r, rows - r), scales));
        store_up_to(c.next + first + r, next, rows - r);
        store_up_to(c.shrink + first + r, exp2_16(sub(before, next)), rows - r);
        store_up_to(so_far + r, next, rows - r);
    }
}

// Of the same rows, scores to `weights`, and their sum into the total. The weights are rounded to
// what they are multiplied as, and so is their sum, so that they add up to 1. `meanwhile(r)` runs
// along with row r.
template <class T, class Meanwhile>
inline void soften(Scratch& c, int64_t first, int64_t rows, const float* scores, uint32_t* weights,
                   int64_t count, float scale, Meanwhile meanwhile) {
    V16 scales = set1(scale * kLog2E);
    for (int64_t r = 0; r < rows; ++r) {
        int64_t from = c.from[first + r], to = c.to[first + r];
        V16 next = set1(-c.next[first + r]), sum = set1(0);
        for (int64_t i = 0; i < count; i += 16) {
            V16 weight = exp2_16(fma(load(scores + r * kContext + i), scales, next));
            if (i < from || i + 16 > to)
                weight = keep(weight, within_16(from - i), within_16(to - i), set1(0));
            sum = add(sum, T::store_weights(weights + r * kContext + i / T::kPack, weight));
        }
        c.added[first + r] = sum_lanes(sum);
        meanwhile(r);
    }
    float* total = c.segment.total + first;
    for (int64_t r = 0; r < rows; r += 16) {
        V16 kept = mul(load_up_to(total + r, rows - r), load_up_to(c.shrink + first + r, rows - r));
        store_up_to(total + r, add(kept, load_up_to(c.added + first + r, rows - r)), rows - r);
    }
}
template <class T>
inline void soften(Scratch& c, int64_t first, int64_t rows, const float* scores, uint32_t* weights,
                   int64_t count, float scale) {
    soften<T>(c, first, rows, scores, weights, count, scale, [](int64_t) {});
}

}  // namespace
