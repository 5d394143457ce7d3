// Products of bf16 rows with a packed weight matrix in tiles: a panel's 16 steps are two tiles of B
// as they lie, and 32 rows of x are laid out as two tiles of A for each chunk, once for all panels.
// Every number of rows takes this way.

#pragma once

#include "product.h"
#include "tiles.h"

namespace {

constexpr int64_t kChunkBytes = kChunk * kPanel * 2;  // of a panel, and of 32 rows
// Of x, so many bytes stay in the second cache while panels pass by, but no more than kMostRows.
constexpr int64_t kHeldBytes = 3 << 18, kMostRows = 256;
// Of a panel, so many chunks stay in the first cache while all held rows pass by.
constexpr int64_t kDepth = 8;
// How far ahead weights are asked for where they are read once: what comes within an access to
// memory.
constexpr int64_t kAheadBytes = 16 << 10;

// From so many bytes on, results are written past the caches: few of them would still be there when
// they are read, and fetching their lines first took a quarter of the product's time.
constexpr int64_t kPastBytes = 4 << 20;

// Whether y is written past the caches. It can be, if panels of its rows are whole lines.
inline bool goes_past(const Product& p, int64_t m) {
    bool lines = p.w->n % kPanel == 0 && (uintptr_t)p.y % 64 == 0;
    return lines && !p.wide && !p.residual && m * p.w->n * 2 >= kPastBytes;
}

// As `finish_panel`, of whole lines.
inline void finish_past(const Product& p, const float* sums, int64_t row, int64_t rows,
                        int64_t panel) {
    const uint16_t* bias = (const uint16_t*)p.w->bias + panel * kPanel;
    V16 low = p.w->bias ? load(bias) : set1(0), high = p.w->bias ? load(bias + 16) : set1(0);
    for (int64_t r = 0; r < rows; ++r) {
        alignas(64) uint16_t line[kPanel];
        store(line, add(load(sums + r * kPanel), low));
        store(line + 16, add(load(sums + r * kPanel + 16), high));
        uint16_t* to = (uint16_t*)p.y + (row + r) * p.w->n + panel * kPanel;
        _mm512_stream_si512((__m512i*)to, _mm512_load_si512(line));
    }
}

// Lays rows of x out as tiles: of each 32 rows the chunks, of each chunk the rows. What is beyond k
// is zero.
inline void hold(const Product& p, int64_t row, int64_t rows, char* held) {
    int64_t bytes = p.w->k * 2, chunks = (p.w->k + kChunk - 1) / kChunk;
    for (int64_t r = 0; r < rows; ++r) {
        const char* from = p.x + (row + r) * bytes;
        char* to = held + r / kBlock * chunks * kChunkBytes + r % kBlock * 64;
        int64_t at = 0;
        for (; at + 64 <= bytes; at += 64, to += kChunkBytes) memcpy(to, from + at, 64);
        if (at < bytes) {
            memset(to, 0, 64);
            memcpy(to, from + at, (size_t)(bytes - at));
        }
    }
}

// Rows of x, held as tiles, with a panel; `sums` has room for them. They are y's from `row` on.
inline void panel_in_tiles(const Product& p, Tiles& tiles, const char* held, int64_t row,
                           int64_t rows, int64_t panel, bool past, float* sums) {
    int64_t steps = steps_of<Bf16>(p.w->k), whole = steps / kTile, left = steps % kTile;
    int64_t block_bytes = (whole + (left > 0)) * kChunkBytes;
    const char* w = (const char*)p.w->weight + panel * steps * kPanel * 4;
    bool once = rows <= kBlock;
    int64_t depth = once ? whole + 1 : kDepth, blocks = (rows + kBlock - 1) / kBlock;
    alignas(64) uint32_t tail[kTile * kPanel];  // the last chunk, if it has fewer steps
    if (left) {
        memset(tail, 0, sizeof(tail));
        memcpy(tail, w + whole * kChunkBytes, (size_t)(left * kPanel * 4));
    }
    for (int64_t first = 0; first < whole || first == 0; first += depth) {
        int64_t last = first + depth < whole ? first + depth : whole;
        for (int64_t block = 0; block < blocks; ++block) {
            int64_t r = block * kBlock, count = rows - r < kBlock ? rows - r : kBlock;
            const char* x = held + block * block_bytes;
            float* to = sums + r * kPanel;
            // Each row block asks for its share of the lines, and first of all for its results'.
            int64_t begin = 32 * block / blocks, end = 32 * (block + 1) / blocks;
            const char* ahead = w + first * kChunkBytes + (once ? kAheadBytes : steps * kPanel * 4);
            int64_t size = p.wide ? 4 : 2, across = p.w->n * size;
            const char* y = p.y + (row + r) * across + panel * kPanel * size;
            int64_t share = first > 0 || past ? 0 : (count + kDepth - 1) / kDepth;
            add_chunks(tiles, count, {x + first * kChunkBytes, 64, kChunkBytes},
                       {w + first * kChunkBytes, kPanel * 4, kChunkBytes}, last - first, to,
                       kPanel * 4, first == 0, [=](int64_t i) __attribute__((always_inline)) {
                           for (int64_t line = begin; line < end; ++line)
                               __builtin_prefetch(ahead + i * kChunkBytes + line * 64, 0, 2);
                           for (int64_t j = i * share; j < (i + 1) * share && j < count; ++j)
                               ask_to_write(y + j * across);
                       });
            if (left && last == whole)
                add_chunks(tiles, count, {x + whole * kChunkBytes, 64, 0}, {tail, kPanel * 4, 0}, 1,
                           to, kPanel * 4, false, nothing);
            // At once, so that this overlaps with the products of the next rows.
            if (last < whole) continue;
            if (past)
                finish_past(p, to, row + r, count, panel);
            else
                finish_panel<Bf16>(p, to, row + r, count, panel);
        }
    }
}

void linear_in_tiles(const Product& p, int64_t m, int32_t threads) {
    int64_t k = p.w->k, panels = (p.w->n + kPanel - 1) / kPanel, blocks = (m + kBlock - 1) / kBlock;
    int64_t block_bytes = (k + kChunk - 1) / kChunk * kChunkBytes;
    int64_t fit = kHeldBytes / block_bytes * kBlock;
    fit = fit < kBlock ? kBlock : fit > kMostRows ? kMostRows : fit;
    // Rows are divided by what can be held, and more finely where there are many threads; where the
    // cuts fall changes no result.
    int64_t parts = (m + fit - 1) / fit, fair = (4 * threads + panels - 1) / panels;
    if (parts < fair) parts = fair < blocks ? fair : blocks;
    bool large = m * p.w->n * k > kSerialWork, past = goes_past(p, m);
#pragma omp parallel num_threads(threads) if (large)
    {
        Tiles tiles;
        alignas(64) float sums[kMostRows * kPanel];
        alignas(64) char room[kHeldBytes];
        char* more = block_bytes > kHeldBytes ? new char[(size_t)block_bytes] : nullptr;
        char* held = more ? more : room;
        int64_t held_part = -1;
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < parts * panels; ++item) {
            int64_t part = item / panels, row = blocks * part / parts * kBlock;
            int64_t end = blocks * (part + 1) / parts * kBlock, rows = (end < m ? end : m) - row;
            if (part != held_part) hold(p, row, rows, held);
            held_part = part;
            panel_in_tiles(p, tiles, held, row, rows, item % panels, past, sums);
        }
        if (past) _mm_sfence();  // for whoever reads them
        delete[] more;
    }
}

}  // namespace
