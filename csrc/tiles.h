// Matrix tiles (AMX): eight registers of up to 16 rows of 64 bytes, of which these kernels use six
// as operands of 2 x 2 products.
//
// What `TILE_DOT` adds to an fp32 number is the dot product of 32 pairs of bf16, a chunk: the
// products of even and of odd pairs, each summed in order with one rounding a step, then both sums
// together. Numbers under 2^-126 count as 0, as operands and as results. So where chunks begin
// belongs to the definition of a sum: they begin at multiples of 32, and even a single row takes
// this way.

#pragma once

#include <stdint.h>
#include <string.h>

// The compiler knows nothing of these registers: only the order of these statements matters.
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::: "memory")
#define TILE_LOAD(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) \
                 : "memory")
// sums += a b, by rows of a and columns of b
#define TILE_DOT(sums, a, b) \
    asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::: "memory")

namespace {

constexpr int64_t kTile = 16;          // rows, and words of a row
constexpr int64_t kBlock = 2 * kTile;  // rows that are multiplied at once
constexpr int64_t kChunk = 32;         // numbers along k that one product takes

// This thread's tiles, as long as it works with them: others who use tiles in the same thread set
// them up anew, and a thread without any is cheaper to switch.
class Tiles {
public:
    ~Tiles() {
        if (rows_) asm volatile("tilerelease" ::: "memory");
    }
    // For `rows` (1 to 32) rows of A: tiles 0 and 1 (sums) and 4 (A) hold the first 16 of them,
    // 2 and 3 (sums) and 5 (A) the others; 6 and 7 (B) are whole.
    void set(int64_t rows) {
        if (rows == rows_) return;
        rows_ = rows;
        Config c;
        int64_t upper = rows < kTile ? rows : kTile, lower = rows - upper;
        for (int tile = 0; tile < 8; ++tile) {
            bool is_lower = tile == 2 || tile == 3 || tile == 5;
            int64_t used = tile >= 6 ? kTile : is_lower ? lower : upper;
            c.shape(tile, used, used ? 64 : 0);
        }
        c.load();
    }
    // For products that have `rows` (1 to 16) columns, or as many rows: tiles 0 and 1 (sums) and 5
    // (B) hold so many columns, 2 and 3 (sums) and 4 (A) so many rows; 6 and 7 are whole.
    void set_few(int64_t rows) {
        if (-rows == rows_) return;
        rows_ = -rows;
        Config c;
        for (int tile = 0; tile < 8; ++tile) {
            bool by_column = tile < 2 || tile == 5, by_row = tile >= 2 && tile <= 4;
            c.shape(tile, by_row ? rows : kTile, by_column ? 4 * rows : 64);
        }
        c.load();
    }

private:
    struct alignas(64) Config {
        uint8_t palette = 1;
        uint8_t start_row = 0;
        uint8_t reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
        void shape(int tile, int64_t tile_rows, int64_t bytes) {
            rows[tile] = (uint8_t)tile_rows;
            row_bytes[tile] = (uint16_t)bytes;
        }
        void load() const { asm volatile("ldtilecfg %0" ::"m"(*this) : "memory"); }
    };
    int64_t rows_ = 0;  // what they are set up for; negative: by `set_few`
};

// A matrix that is read or written in tiles: `stride` bytes from row to row; `step` bytes from one
// chunk to the next, along k.
struct Operand {
    const void* at;
    int64_t stride;
    int64_t step;
};

// sums [rows][32] (`stride` bytes apart) of `chunks` chunks of a [rows] with b [32 columns], words
// of pairs; added to what sums hold already unless they are `fresh`. Two: more than 16 rows.
// `meanwhile(i)` runs along with chunk i.
template <bool Two, class Meanwhile>
inline void add_chunks(Operand a, Operand b, int64_t chunks, float* sums, int64_t stride,
                       bool fresh, Meanwhile meanwhile) {
    const char *upper = (const char*)a.at, *lower = upper + kTile * a.stride;
    const char *left = (const char*)b.at, *right = left + kTile * 4;
    float* below = sums + kTile * stride / 4;
    if (fresh) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        if (Two) {
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
    } else {
        TILE_LOAD(0, sums, stride);
        TILE_LOAD(1, sums + kTile, stride);
        if (Two) {
            TILE_LOAD(2, below, stride);
            TILE_LOAD(3, below + kTile, stride);
        }
    }
    for (int64_t i = 0; i < chunks; ++i) {
        TILE_LOAD(4, upper + i * a.step, a.stride);
        TILE_LOAD(6, left + i * b.step, b.stride);
        TILE_DOT(0, 4, 6);
        TILE_LOAD(7, right + i * b.step, b.stride);
        TILE_DOT(1, 4, 7);
        if (Two) {
            TILE_LOAD(5, lower + i * a.step, a.stride);
            TILE_DOT(2, 5, 6);
            TILE_DOT(3, 5, 7);
        }
        meanwhile(i);
    }
    TILE_STORE(0, sums, stride);
    TILE_STORE(1, sums + kTile, stride);
    if (Two) {
        TILE_STORE(2, below, stride);
        TILE_STORE(3, below + kTile, stride);
    }
}

inline void nothing(int64_t) {}

// A line that will be written (and may be read before).
inline void ask_to_write(const char* at) { asm volatile("prefetchw %0" ::"m"(*at)); }

// The same for 1 to 32 rows.
template <class Meanwhile>
__attribute__((noinline)) void add_chunks(Tiles& tiles, int64_t rows, Operand a, Operand b,
                                          int64_t chunks, float* sums, int64_t stride, bool fresh,
                                          Meanwhile meanwhile) {
    tiles.set(rows);
    if (rows > kTile)
        add_chunks<true>(a, b, chunks, sums, stride, fresh, meanwhile);
    else
        add_chunks<false>(a, b, chunks, sums, stride, fresh, meanwhile);
}

}  // namespace
