// Products of bf16 rows with a packed weight matrix in tiles: a panel's 16 steps are two tiles of B
// as they lie, and 32 rows of x are two tiles of A. Every number of rows takes this way.

#pragma once

#include "product.h"
#include "tiles.h"

namespace {

constexpr int64_t kChunkBytes = kChunk * kPanel * 2;  // of a panel
// Of x, so many bytes stay in the second cache while panels pass by, but no more than kMostRows.
constexpr int64_t kHeldBytes = 3 << 18, kMostRows = 256;
// Of a panel, so many chunks stay in the first cache while all held rows pass by.
constexpr int64_t kDepth = 8;
// How far ahead weights are asked for where they are read once: what comes within an access to
// memory.
constexpr int64_t kAheadBytes = 16 << 10;

// Rows of x with a panel; `sums` has room for them.
inline void panel_in_tiles(const Product& p, Tiles& tiles, const char* x, int64_t stride,
                           int64_t row, int64_t rows, int64_t panel, float* sums) {
    int64_t steps = steps_of<Bf16>(p.w->k), chunks = steps / kTile, left = steps % kTile;
    const char* w = (const char*)p.w->weight + panel * steps * kPanel * 4;
    bool once = rows <= kBlock;
    int64_t depth = once ? chunks + 1 : kDepth, blocks = (rows + kBlock - 1) / kBlock;
    alignas(64) uint32_t tail[kTile * kPanel];  // the last chunk, if it has fewer steps
    if (left) {
        memset(tail, 0, sizeof(tail));
        memcpy(tail, w + chunks * kChunkBytes, (size_t)(left * kPanel * 4));
    }
    for (int64_t first = 0; first < chunks || first == 0; first += depth) {
        int64_t last = first + depth < chunks ? first + depth : chunks;
        for (int64_t block = 0; block < blocks; ++block) {
            int64_t r = block * kBlock, count = rows - r < kBlock ? rows - r : kBlock;
            const char* from = x + (row + r) * stride;
            float* to = sums + r * kPanel;
            // Each row block asks for its share of the lines.
            int64_t begin = 32 * block / blocks, end = 32 * (block + 1) / blocks;
            const char* ahead = w + first * kChunkBytes + (once ? kAheadBytes : steps * kPanel * 4);
            add_chunks(tiles, count, {from + first * kChunk * 2, stride, kChunk * 2},
                       {w + first * kChunkBytes, kPanel * 4, kChunkBytes}, last - first, to,
                       kPanel * 4, first == 0, [=](int64_t i) __attribute__((always_inline)) {
                           for (int64_t line = begin; line < end; ++line)
                               __builtin_prefetch(ahead + i * kChunkBytes + line * 64, 0, 2);
                       });
            if (left && last == chunks)
                add_chunks(tiles, count, {from + chunks * kChunk * 2, stride, 0},
                           {tail, kPanel * 4, 0}, 1, to, kPanel * 4, false, nothing);
            // At once, so that this overlaps with the products of the next rows.
            if (last == chunks) finish_panel<Bf16>(p, to, row + r, count, panel);
        }
    }
}

void linear_in_tiles(const Product& p, int64_t m, int32_t threads) {
    int64_t k = p.w->k, panels = (p.w->n + kPanel - 1) / kPanel, blocks = (m + kBlock - 1) / kBlock;
    int64_t chunks = (k + kChunk - 1) / kChunk, stride = chunks * kChunk * 2;
    int64_t held = kHeldBytes / (stride * kBlock) * kBlock;
    held = held < kBlock ? kBlock : held > kMostRows ? kMostRows : held;
    // Rows are divided by what can be held, and more finely where there are many threads; where the
    // cuts fall changes no result.
    int64_t parts = (m + held - 1) / held, fair = (4 * threads + panels - 1) / panels;
    if (parts < fair) parts = fair < blocks ? fair : blocks;
    // Tiles read whole chunks: where k is no multiple of 32, of a copy that ends in zeros.
    char* padded = k % kChunk ? new char[(size_t)(m * stride)] : nullptr;
    const char* x = padded ? padded : p.x;
    bool large = m * p.w->n * k > kSerialWork;
#pragma omp parallel num_threads(threads) if (large)
    {
        Tiles tiles;
        alignas(64) float sums[kMostRows * kPanel];
        if (padded) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < m; ++r) {
                memcpy(padded + r * stride, p.x + r * k * 2, (size_t)k * 2);
                memset(padded + r * stride + k * 2, 0, (size_t)(stride - k * 2));
            }
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < parts * panels; ++item) {
            int64_t part = item / panels, row = blocks * part / parts * kBlock;
            int64_t end = blocks * (part + 1) / parts * kBlock;
            panel_in_tiles(p, tiles, x, stride, row, (end < m ? end : m) - row, item % panels,
                           sums);
        }
    }
    delete[] padded;
}

}  // namespace
