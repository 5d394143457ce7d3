// Products of bf16 rows with a packed weight matrix in tiles: a panel's 16 steps are two tiles of B
// as they lie, and 32 rows of x are laid out as two tiles of A for each chunk, once for all panels.
// Every number of rows takes this way.

#pragma once

#include "product.h"
#include "rows.h"
#include "tiles.h"

namespace {

constexpr int64_t kChunkBytes = kChunk * kPanel * 2;  // of a panel, and of 32 rows
// Of x, so many bytes stay in the second cache while panels pass by, but no more than kMostRows.
constexpr int64_t kHeldBytes = 3 << 18, kMostRows = 256;
// Of a panel, so many chunks stay in the first cache while all held rows pass by.
constexpr int64_t kDepth = 8;
// Weights that are read once are asked for twice: so many chunks ahead for the second cache, and so
// many for the first. Further ahead, or for one cache only, is slower.
constexpr int64_t kAheadInSecond = 2, kAheadInFirst = 1;

// From so many bytes on, results are written past the caches: few of them would still be there when
// they are read, and fetching their lines first took a quarter of the product's time.
constexpr int64_t kPastBytes = 4 << 20;

// Whether y [m, n] is written past the caches. It can be, if panels of its rows are whole lines.
inline bool goes_past(const Product& p, int64_t m, int64_t n) {
    bool lines = n % kPanel == 0 && (uintptr_t)p.y % 64 == 0;
    return lines && !p.wide && !p.residual && m * n * 2 >= kPastBytes;
}

// What is stored of x, as a number.
inline V16 rounded_bf16(V16 x) { return widen(narrow(x)); }

inline void write_past(uint16_t* to, V16 low, V16 high) {
    alignas(64) uint16_t line[kPanel];
    store(line, low);
    store(line + 16, high);
    _mm512_stream_si512((__m512i*)to, _mm512_load_si512(line));
}

// What becomes of a panel's sums of rows from `row` on: y of a product.
struct Results {
    const Product& p;
    int64_t panel;
    bool past;

    // Fetches the line in which those of a row will lie.
    void ask(int64_t row) const {
        int64_t size = p.wide ? 4 : 2;
        if (!past) ask_to_write(p.y + (row * p.w->n + panel * kPanel) * size);
    }
    void finish(const float* sums, int64_t row, int64_t rows) const {
        if (!past) return finish_panel<Bf16>(p, sums, row, rows, panel);
        const uint16_t* bias = (const uint16_t*)p.w->bias + panel * kPanel;
        V16 low = p.w->bias ? load(bias) : set1(0), high = p.w->bias ? load(bias + 16) : set1(0);
        uint16_t* to = (uint16_t*)p.y + row * p.w->n + panel * kPanel;
        for (int64_t r = 0; r < rows; ++r, to += p.w->n, sums += kPanel)
            write_past(to, add(load(sums), low), add(load(sums + 16), high));
    }
};

// The same of a panel of gates, or of the panel that they open: y [m, n / 2]. Both halves are
// rounded as if they were results themselves.
struct Gated {
    const Product& p;
    int64_t panel;
    bool past;
    bool opens;       // gates have been through
    uint16_t* gates;  // [rows][kPanel], of the thread's rows, of which the first is `first`
    int64_t first;

    void ask(int64_t row) const {
        if (!past && opens) ask_to_write(p.y + (row * p.w->n / 2 + panel * kPanel) * 2);
    }
    void finish(const float* sums, int64_t row, int64_t rows) const {
        int64_t inner = p.w->n / 2, column = panel * kPanel;
        const uint16_t* bias = (const uint16_t*)p.w->bias + column + (opens ? inner : 0);
        V16 low = p.w->bias ? load(bias) : set1(0), high = p.w->bias ? load(bias + 16) : set1(0);
        uint16_t *gate = gates + (row - first) * kPanel, *to = (uint16_t*)p.y + row * inner + column;
        for (int64_t r = 0; r < rows; ++r, gate += kPanel, sums += kPanel, to += inner) {
            V16 one = add(load(sums), low), two = add(load(sums + 16), high);
            if (!opens) {
                store(gate, one);
                store(gate + 16, two);
                continue;
            }
            one = mul(silu(load(gate)), rounded_bf16(one));
            two = mul(silu(load(gate + 16)), rounded_bf16(two));
            if (past) {
                write_past(to, one, two);
            } else {
                store(to, one);
                store(to + 16, two);
            }
        }
    }
};

// Bytes from one chunk of held rows to the next: if they are few they lie close, and stay in the
// first cache.
inline int64_t held_step(int64_t rows) { return (rows < kBlock ? rows : kBlock) * 64; }

// Lays rows of x out as tiles: of each 32 rows the chunks, of each chunk the rows. What is beyond k
// is zero.
inline void hold(const Product& p, int64_t row, int64_t rows, char* held) {
    int64_t bytes = p.w->k * 2, chunks = (p.w->k + kChunk - 1) / kChunk, step = held_step(rows);
    for (int64_t r = 0; r < rows; ++r) {
        const char* from = p.x + (row + r) * bytes;
        char* to = held + r / kBlock * chunks * kChunkBytes + r % kBlock * 64;
        int64_t at = 0;
        for (; at + 64 <= bytes; at += 64, to += step) memcpy(to, from + at, 64);
        if (at < bytes) {
            memset(to, 0, 64);
            memcpy(to, from + at, (size_t)(bytes - at));
        }
    }
}

// A quarter of what is asked for while chunk `w` is worked on: the other caches' chunks lie `skip`
// further on than if all chunks were neighbours.
inline __attribute__((always_inline)) void ask_ahead(const char* w, int quarter, int64_t skip_first,
                                                     int64_t skip_second) {
    for (int line = 8 * quarter; line < 8 * quarter + 8; ++line) {
        __builtin_prefetch(w + skip_second + kAheadInSecond * kChunkBytes + line * 64, 0, 2);
        __builtin_prefetch(w + skip_first + kAheadInFirst * kChunkBytes + line * 64, 0, 3);
    }
}

// The sums so far of 1 to 32 rows, in tiles, and the next chunk of them (`two` if there are more
// than 16) with chunk `w` of a panel.
template <bool Two>
inline __attribute__((always_inline)) void stream_chunk(const char* x, const char* w,
                                                        int64_t skip_first, int64_t skip_second) {
    TILE_LOAD(4, x, 64);
    ask_ahead(w, 0, skip_first, skip_second);
    TILE_LOAD(6, w, kPanel * 4);
    TILE_DOT(0, 4, 6);
    ask_ahead(w, 1, skip_first, skip_second);
    TILE_LOAD(7, w + 64, kPanel * 4);
    TILE_DOT(1, 4, 7);
    ask_ahead(w, 2, skip_first, skip_second);
    if (Two) {
        TILE_LOAD(5, x + kTile * 64, 64);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
    }
    ask_ahead(w, 3, skip_first, skip_second);
}

// All chunks of a panel for at most 32 rows, which are all there are: each weight comes from memory
// and is used once. x holds chunks of them `step` bytes apart; the panel that this thread takes
// afterwards lies at `next`.
template <bool Two>
__attribute__((noinline)) void stream_chunks(const char* x, int64_t step, const char* w,
                                             int64_t chunks, const char* next, float* sums) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (Two) {
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    int64_t skip = next - w - chunks * kChunkBytes, i = 0;
    for (; i < chunks - kAheadInSecond; ++i, x += step, w += kChunkBytes)
        stream_chunk<Two>(x, w, 0, 0);
    for (; i < chunks; ++i, x += step, w += kChunkBytes)
        stream_chunk<Two>(x, w, i + kAheadInFirst < chunks ? 0 : skip, skip);
    TILE_STORE(0, sums, kPanel * 4);
    TILE_STORE(1, sums + kTile, kPanel * 4);
    if (Two) {
        TILE_STORE(2, sums + kTile * kPanel, kPanel * 4);
        TILE_STORE(3, sums + kTile * kPanel + kTile, kPanel * 4);
    }
}

// A panel: where it lies, and where the one does that this thread works on next.
struct Panel {
    const char* at;
    const char* next;
    int64_t steps;
};

// Rows of x, held as tiles, with a panel; `sums` has room for them. They are y's from `row` on.
template <class Results>
inline void panel_in_tiles(const Panel& panel, Tiles& tiles, const char* held, int64_t row,
                           int64_t rows, float* sums, const Results& results) {
    int64_t whole = panel.steps / kTile, left = panel.steps % kTile;
    int64_t block_bytes = (whole + (left > 0)) * kChunkBytes;
    const char* w = panel.at;
    int64_t blocks = (rows + kBlock - 1) / kBlock;
    alignas(64) uint32_t tail[kTile * kPanel];  // the last chunk, if it has fewer steps
    if (left) {
        memset(tail, 0, sizeof(tail));
        memcpy(tail, w + whole * kChunkBytes, (size_t)(left * kPanel * 4));
    }
    if (rows <= kBlock && whole) {
        int64_t step = held_step(rows);
        for (int64_t r = 0; r < rows; ++r) results.ask(row + r);
        tiles.set(rows);
        if (rows > kTile)
            stream_chunks<true>(held, step, w, whole, panel.next, sums);
        else
            stream_chunks<false>(held, step, w, whole, panel.next, sums);
        if (left)
            add_chunks(tiles, rows, {held + whole * step, 64, 0}, {tail, kPanel * 4, 0}, 1,
                       sums, kPanel * 4, false, nothing);
        return results.finish(sums, row, rows);
    }
    for (int64_t first = 0; first < whole || first == 0; first += kDepth) {
        int64_t last = first + kDepth < whole ? first + kDepth : whole;
        for (int64_t block = 0; block < blocks; ++block) {
            int64_t r = block * kBlock, count = rows - r < kBlock ? rows - r : kBlock;
            const char* x = held + block * block_bytes;
            float* to = sums + r * kPanel;
            // Each row block asks for its share of the lines, and first of all for its results'.
            int64_t begin = 32 * block / blocks, end = 32 * (block + 1) / blocks;
            const char* ahead = panel.next + first * kChunkBytes;
            int64_t share = first > 0 ? 0 : (count + kDepth - 1) / kDepth;
            add_chunks(tiles, count, {x + first * kChunkBytes, 64, kChunkBytes},
                       {w + first * kChunkBytes, kPanel * 4, kChunkBytes}, last - first, to,
                       kPanel * 4, first == 0, [&](int64_t i) __attribute__((always_inline)) {
                           for (int64_t line = begin; line < end; ++line)
                               __builtin_prefetch(ahead + i * kChunkBytes + line * 64, 0, 2);
                           for (int64_t j = i * share; j < (i + 1) * share && j < count; ++j)
                               results.ask(row + r + j);
                       });
            if (left && last == whole)
                add_chunks(tiles, count, {x + whole * kChunkBytes, 64, 0}, {tail, kPanel * 4, 0}, 1,
                           to, kPanel * 4, false, nothing);
            // At once, so that this overlaps with the products of the next rows.
            if (last == whole) results.finish(to, row + r, count);
        }
    }
}

// y = x w^T, or, `kGated`, silu of its first half times its second one.
template <bool kGated>
void linear_in_tiles(const Product& p, int64_t m, int32_t threads) {
    int64_t k = p.w->k, steps = steps_of<Bf16>(k), panel_bytes = steps * kPanel * 4;
    int64_t panels = (p.w->n + kPanel - 1) / kPanel / (kGated ? 2 : 1);
    int64_t blocks = (m + kBlock - 1) / kBlock;
    int64_t block_bytes = (k + kChunk - 1) / kChunk * kChunkBytes;
    int64_t fit = kHeldBytes / block_bytes * kBlock;
    fit = fit < kBlock ? kBlock : fit > kMostRows ? kMostRows : fit;
    // Rows are divided by what can be held, and more finely where there are many threads; where the
    // cuts fall changes no result.
    int64_t parts = (m + fit - 1) / fit, fair = (4 * threads + panels - 1) / panels;
    if (parts < fair) parts = fair < blocks ? fair : blocks;
    bool large = m * p.w->n * k > kSerialWork;
    bool past = goes_past(p, m, kGated ? p.w->n / 2 : p.w->n);
#pragma omp parallel num_threads(threads) if (large)
    {
        Tiles tiles;
        alignas(64) float sums[kMostRows * kPanel];
        alignas(64) uint16_t gates[kGated ? kMostRows * kPanel : 1];
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
            int64_t panel = item % panels;
            const char* at = (const char*)p.w->weight + panel * panel_bytes;
            if constexpr (kGated) {
                const char* other = at + panels * panel_bytes;
                panel_in_tiles({at, other, steps}, tiles, held, row, rows, sums,
                               Gated{p, panel, past, false, gates, row});
                panel_in_tiles({other, at + panel_bytes, steps}, tiles, held, row, rows, sums,
                               Gated{p, panel, past, true, gates, row});
            } else {
                panel_in_tiles({at, at + panel_bytes, steps}, tiles, held, row, rows, sums,
                               Results{p, panel, past});
            }
        }
        if (past) _mm_sfence();  // for whoever reads them
        delete[] more;
    }
}

}  // namespace
