// Ragged attention over the paged KV pool: one kernel for prefill, chunks and decode.
//
// The work is cut into items: up to kTileRows query rows (a row is one head of one token) that
// share a KV head, of one sequence. An item walks its context in blocks of kContext tokens that
// begin at multiples of kContext, whatever the pool's block size, and keeps a running softmax a
// row. Of a block a row takes in what it may see, in order of position, and skips blocks of which
// it sees nothing; so its result depends on its own position alone, not on its neighbours.

#pragma once

#include "linear.h"
#include "rows.h"

namespace {

constexpr int64_t kContext = 64, kTileRows = 64, kMaxDim = 256;

// What one item works in; about a third of a megabyte at most.
struct alignas(64) Scratch {
    uint32_t keys[kContext * kMaxDim];  // panels of 32 tokens, as packed weights
    float values[kContext * kMaxDim];   // [kContext][dim, rounded up to 16]
    float sums[kTileRows * kMaxDim];    // [rows][dim, rounded up to 16]
    float scores[kTileRows * kContext];
    uint32_t queries[kTileRows * kMaxDim];
    uint32_t zero[kMaxDim];
    float most[kTileRows];   // the running maximum
    float total[kTileRows];  // the running sum of weights
    float shrink[kTileRows];
    int64_t from[kTileRows];  // what of the block the row sees
    int64_t to[kTileRows];
};

// sums = sums * shrink + scores * values over tokens from..to, for R rows and N vectors at `at`.
template <int R, int N>
__attribute__((noinline)) void weigh(Scratch& c, int64_t row, int64_t at, int64_t width, int64_t from, int64_t to) {
    V16 sum[R][N];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < N; ++v)
            sum[r][v] = mul(load(c.sums + (row + r) * width + at + v * 16),
                            set1(c.shrink[row + r]));
    for (int64_t j = from; j < to; ++j) {
        V16 value[N];
        for (int v = 0; v < N; ++v) value[v] = load(c.values + j * width + at + v * 16);
        for (int r = 0; r < R; ++r) {
            V16 weight = set1(c.scores[(row + r) * kContext + j]);
            for (int v = 0; v < N; ++v) sum[r][v] = fma(weight, value[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < N; ++v) store(c.sums + (row + r) * width + at + v * 16, sum[r][v]);
}

template <int R = kWideRows>
inline void weigh_rows(int64_t rows, Scratch& c, int64_t row, int64_t width, int64_t from,
                       int64_t to) {
    if constexpr (R > 0) {
        if (rows != R) return weigh_rows<R - 1>(rows, c, row, width, from, to);
        int64_t at = 0;
        for (; at + kWide * 16 <= width; at += kWide * 16)
            weigh<R, kWide>(c, row, at, width, from, to);
        for (; at < width; at += 16) weigh<R, 1>(c, row, at, width, from, to);
    }
}

// Scores to weights; updates the running maximum and sum of a row.
inline void soften(Scratch& c, int64_t row, float scale) {
    const float kNone = -INFINITY;
    float* scores = c.scores + row * kContext;
    int64_t from = c.from[row], to = c.to[row];
    V16 most = set1(c.most[row]);
    for (int64_t i = 0; i < to; i += 16) {
        V16 scaled = mul(load(scores + i), set1(scale));
        if (i < from || i + 16 > to)
            scaled = keep(scaled, from > i ? (from - i < 16 ? from - i : 16) : 0,
                          to - i < 16 ? to - i : 16, set1(kNone));
        store(scores + i, scaled);
        most = max(most, scaled);
    }
    float next = max_lanes(most);
    V16 sum = set1(0);
    for (int64_t i = 0; i < to; i += 16) {
        V16 weight = exp16(sub(load(scores + i), set1(next)));
        store(scores + i, weight);
        sum = add(sum, weight);
    }
    c.shrink[row] = exp1(c.most[row] - next);
    c.total[row] = c.total[row] * c.shrink[row] + sum_lanes(sum);
    c.most[row] = next;
}

struct Item {
    int64_t sequence;
    int64_t kv_head;
    int64_t first_row;  // row = token * group + head within the group
    int64_t rows;
};

// Bring tokens first..first + count of the context into c.keys and c.values; those before `from`
// are hidden from every row and stay zero, as what lies behind the last one.
template <class T>
inline void fetch(const Step& s, int64_t index, const Item& item, int64_t first, int64_t from,
                  int64_t count, Scratch& c) {
    typedef typename T::Value Value;
    int64_t dim = s.head_dim, steps = steps_of<T>(dim), width = (dim + 15) / 16 * 16;
    int64_t to_value = s.block_size * s.kv_heads * dim;
    const int64_t* table = s.tables + item.sequence * s.max_blocks;
    const uint32_t* keys[kContext];
    for (int64_t i = 0; i < kContext; ++i) {
        keys[i] = c.zero;
        if (i < from || i >= count) continue;
        int64_t position = first + i;
        const Value* key = key_at<Value>(s, index, table[position / s.block_size],
                                         position % s.block_size) +
                           item.kv_head * dim;
        keys[i] = (const uint32_t*)key;
        for (int64_t d = 0; d < dim; d += 16)
            store(c.values + i * width + d, load_up_to(key + to_value + d, dim - d));
    }
    for (int64_t i = 0; i < (count + kPanel - 1) / kPanel * kPanel; i += 16)
        transpose(keys + i, steps, c.keys + i / kPanel * steps * kPanel + i % kPanel, kPanel);
}

template <class T>
void attend_item(const Layer& layer, const Step& s, int64_t index, const Item& item, Scratch& c) {
    typedef typename T::Value Value;
    int64_t dim = s.head_dim, steps = steps_of<T>(dim), width = (dim + 15) / 16 * 16;
    int64_t group = s.heads / s.kv_heads, row_width = (s.heads + 2 * s.kv_heads) * dim;
    int64_t start = s.query_starts[item.sequence];
    int64_t before = s.context_lens[item.sequence] - (s.query_starts[item.sequence + 1] - start);
    for (int64_t r = 0; r < item.rows; ++r) {
        int64_t token = (item.first_row + r) / group, head = (item.first_row + r) % group;
        const Value* q = (const Value*)s.qkv + (start + token) * row_width +
                         (item.kv_head * group + head) * dim;
        memcpy(c.queries + r * steps, q, (size_t)steps * 4);
        c.most[r] = -INFINITY;
        c.total[r] = 0;
    }
    memset(c.sums, 0, (size_t)(item.rows * width) * 4);
    int64_t first_position = before + item.first_row / group;
    int64_t last_position = before + (item.first_row + item.rows - 1) / group;
    int64_t seen = layer.window && first_position >= layer.window
                       ? first_position - layer.window + 1
                       : 0;
    for (int64_t block = seen / kContext * kContext; block <= last_position; block += kContext) {
        int64_t count = last_position + 1 - block < kContext ? last_position + 1 - block : kContext;
        fetch<T>(s, index, item, block, seen - block, count, c);
        for (int64_t panel = 0; panel * kPanel < count; ++panel)
            for (int64_t r = 0; r < item.rows; r += kRows) {
                int64_t rows = item.rows - r < kRows ? item.rows - r : kRows;
                products<T>(rows, (const char*)(c.queries + r * steps), steps * 4,
                            c.keys + panel * steps * kPanel, dim,
                            c.scores + r * kContext + panel * kPanel, kContext);
            }
        for (int64_t r = 0; r < item.rows; ++r) {
            int64_t position = before + (item.first_row + r) / group;
            int64_t to = position + 1 - block, from = 0;
            if (layer.window) from = position - layer.window + 1 - block;
            c.from[r] = from > 0 ? from : 0;
            c.to[r] = to < kContext ? to : kContext;
            if (c.from[r] < c.to[r]) soften(c, r, s.scale);
        }
        for (int64_t r = 0, rows = 1; r < item.rows; r += rows, rows = 1) {
            while (r + rows < item.rows && rows < kWideRows && c.from[r + rows] == c.from[r] &&
                   c.to[r + rows] == c.to[r])
                ++rows;
            if (c.from[r] < c.to[r])
                weigh_rows(rows, c, r, width, c.from[r], c.to[r]);
        }
    }
    for (int64_t r = 0; r < item.rows; ++r) {
        int64_t token = (item.first_row + r) / group, head = (item.first_row + r) % group;
        Value* out = (Value*)s.attended + (start + token) * s.heads * dim +
                     (item.kv_head * group + head) * dim;
        for (int64_t d = 0; d < dim; d += 16)
            store_up_to(out + d, div(load(c.sums + r * width + d), set1(c.total[r])), dim - d);
    }
}

template <class T>
void attend(const Layer& layer, const Step& s, int64_t index) {
    int64_t group = s.heads / s.kv_heads;
    // tiles[b]: row tiles of the sequences before b
    int64_t* tiles = new int64_t[s.sequences + 1];
    tiles[0] = 0;
    for (int64_t b = 0; b < s.sequences; ++b) {
        int64_t rows = (s.query_starts[b + 1] - s.query_starts[b]) * group;
        tiles[b + 1] = tiles[b] + (rows + kTileRows - 1) / kTileRows;
    }
    int64_t items = tiles[s.sequences] * s.kv_heads;
#pragma omp parallel num_threads(s.threads) if (items > 1)
    {
        Scratch scratch;
        memset(scratch.zero, 0, sizeof(scratch.zero));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < items; ++i) {
            int64_t tile = i / s.kv_heads, low = 0, high = s.sequences;
            while (high - low > 1) {
                int64_t middle = (low + high) / 2;
                if (tiles[middle] <= tile)
                    low = middle;
                else
                    high = middle;
            }
            int64_t rows = (s.query_starts[low + 1] - s.query_starts[low]) * group;
            int64_t first = (tile - tiles[low]) * kTileRows;
            Item item = {low, i % s.kv_heads, first,
                         rows - first < kTileRows ? rows - first : kTileRows};
            attend_item<T>(layer, s, index, item, scratch);
        }
    }
    delete[] tiles;
}

void attend_any(const Layer* layer, const Step* step, int64_t index) {
    if (step->dtype == kBf16)
        attend<Bf16>(*layer, *step, index);
    else
        attend<Fp32>(*layer, *step, index);
}

}  // namespace
