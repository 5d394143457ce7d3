// Weight matrices: packing, looking rows up, and products. One product kernel for every number of
// rows: a tile of `R` rows by kVectors * 16 columns stays in registers for one pass over k, so an
// output element is always the same sum in the same order.

#pragma once

#include "product.h"
#ifdef __AMX_BF16__
#include "linear_tiles.h"
#endif

namespace {

// Steps (128 bytes each) that weights are prefetched ahead: what a core gets through in the time of
// an access to memory, which the hardware's own prefetching does not cover from one row up.
constexpr int64_t kAhead = 64;

// out[r][column] of R rows of x (`stride` bytes apart) with `columns` columns of a panel of
// `Width`, N vectors at a time; what the last of these has beyond `columns` is written too.
template <class T, int R, int N, int64_t Width>
__attribute__((noinline)) void tile(const char* x, int64_t stride, const uint32_t* panel,
                                    int64_t k, int64_t columns, float* out, int64_t out_stride) {
    int64_t words = k / T::kPack;
    for (int64_t part = 0; part < columns; part += N * 16) {
        const uint32_t* w = panel + part;
        V16 sum[R][N];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < N; ++v) sum[r][v] = set1(0);
        for (int64_t step = 0; step < words; ++step) {
            W16 weights[N];
            for (int v = 0; v < N; ++v) {
                weights[v] = load_words(w + step * Width + v * 16);
                __builtin_prefetch(w + (step + kAhead) * Width + v * 16);
            }
            for (int r = 0; r < R; ++r) {
                uint32_t word;
                memcpy(&word, x + r * stride + step * 4, 4);
                for (int v = 0; v < N; ++v) sum[r][v] = T::dot(sum[r][v], word, weights[v]);
            }
        }
        if (T::kPack == 2 && k % 2) {  // the last pair has no second half, and x may end here
            for (int r = 0; r < R; ++r) {
                uint16_t half;
                memcpy(&half, x + r * stride + words * 4, 2);
                for (int v = 0; v < N; ++v)
                    sum[r][v] = T::dot(sum[r][v], half, load_words(w + words * Width + v * 16));
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < N; ++v) store(out + r * out_stride + part + v * 16, sum[r][v]);
    }
}

// `tile` for a number of rows up to R that is known at run time only.
template <class T, int R, int N, int64_t Width>
inline void products(int64_t rows, const char* x, int64_t stride, const uint32_t* panel, int64_t k,
                     int64_t columns, float* out, int64_t out_stride) {
    if constexpr (R > 0) {
        if (rows == R)
            tile<T, R, N, Width>(x, stride, panel, k, columns, out, out_stride);
        else
            products<T, R - 1, N, Width>(rows, x, stride, panel, k, columns, out, out_stride);
    }
}

template <class T>
inline void rows_by_panel(const Product& p, int64_t row, int64_t rows, int64_t panel) {
    typedef typename T::Value Value;
    int64_t k = p.w->k, bytes = k * (int64_t)sizeof(Value);
    float sums[kRows * kPanel];
    const uint32_t* weight = (const uint32_t*)p.w->weight + panel * steps_of<T>(k) * kPanel;
    products<T, kRows, kVectors, kPanel>(rows, p.x + row * bytes, bytes, weight, k, kPanel, sums,
                                         kPanel);
    finish_panel<T>(p, sums, row, rows, panel);
}

// Rows of a tile for m rows in all: of the sizes near kRows the one with the least work, where a
// tile of few rows takes as long as one of kBusyRows, waiting for its own sums.
inline int64_t tile_rows(int64_t m) {
    if (m <= kRows) return m;
    int64_t best = kRows, least = INT64_MAX;
    for (int64_t size = kRows; size > 0 && size >= kRows - 2; --size) {
        int64_t rest = m % size;
        int64_t work = m - rest + (rest == 0 || rest > kBusyRows ? rest : kBusyRows);
        if (work < least) {
            least = work;
            best = size;
        }
    }
    return best;
}

template <class T>
void linear(const Product& p, int64_t m, int32_t threads) {
    int64_t panels = (p.w->n + kPanel - 1) / kPanel;
    int64_t size = tile_rows(m), tiles = (m + size - 1) / size;
    // With many threads the rows are divided too; where the cuts fall changes no result.
    int64_t blocks = (4 * threads + panels - 1) / panels;
    if (blocks > tiles) blocks = tiles;
    bool large = m * p.w->n * p.w->k > kSerialWork;
#pragma omp parallel for num_threads(threads) schedule(static) if (large)
    for (int64_t item = 0; item < blocks * panels; ++item) {
        int64_t block = item / panels, panel = item % panels;
        int64_t last = tiles * (block + 1) / blocks;
        for (int64_t t = tiles * block / blocks; t < last; ++t) {
            int64_t row = t * size;
            rows_by_panel<T>(p, row, m - row < size ? m - row : size, panel);
        }
    }
}

void linear_any(const Linear* w, const void* x, const void* residual, void* y, int64_t m,
                int32_t wide, int32_t dtype, int32_t threads) {
    Product p = {w, (const char*)x, (const char*)residual, (char*)y, wide != 0};
    if (m == 0) return;
    if (dtype == kBf16)
#ifdef __AMX_BF16__
        linear_in_tiles<false>(p, m, threads);
#else
        linear<Bf16>(p, m, threads);
#endif
    else
        linear<Fp32>(p, m, threads);
}

// y [m, n / 2] = silu(the first half of x w^T) * the second one, as `linear_any` and `silu_mul_any`
// give it, but without a stop between them; false if there is no such kernel, and nothing is done.
bool gated_any(const Linear* w, const void* x, void* y, int64_t m, int32_t dtype, int32_t threads) {
#ifdef __AMX_BF16__
    if (dtype == kBf16 && w->n % (2 * kPanel) == 0 && m > 0) {
        Product p = {w, (const char*)x, nullptr, (char*)y, false};
        linear_in_tiles<true>(p, m, threads);
        return true;
    }
#endif
    (void)w, (void)x, (void)y, (void)m, (void)dtype, (void)threads;
    return false;
}

template <class T>
void pack(const typename T::Value* src, uint32_t* dst, int64_t n, int64_t k, int32_t threads) {
    int64_t panels = (n + kPanel - 1) / kPanel, steps = steps_of<T>(k);
#pragma omp parallel num_threads(threads)
    {
        // A panel's source, since it may be its destination too.
        typename T::Value* rows = new typename T::Value[kPanel * steps * T::kPack];
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel) {
            for (int64_t i = 0; i < kPanel; ++i) {
                typename T::Value* row = rows + i * steps * T::kPack;
                memset(row, 0, (size_t)steps * 4);
                if (panel * kPanel + i < n)
                    memcpy(row, src + (panel * kPanel + i) * k, (size_t)k * sizeof(*row));
            }
            uint32_t* to = dst + panel * steps * kPanel;
            for (int64_t part = 0; part < kPanel; part += 16) {
                const uint32_t* words[16];
                for (int64_t i = 0; i < 16; ++i)
                    words[i] = (const uint32_t*)rows + (part + i) * steps;
                transpose(words, steps, to + part, kPanel);
            }
        }
        delete[] rows;
    }
}

void pack_any(const void* src, void* dst, int64_t n, int64_t k, int32_t dtype, int32_t threads) {
    if (dtype == kBf16)
        pack<Bf16>((const uint16_t*)src, (uint32_t*)dst, n, k, threads);
    else
        pack<Fp32>((const float*)src, (uint32_t*)dst, n, k, threads);
}

void embed_any(const void* packed, const int64_t* ids, void* y, int64_t m, int64_t k,
               int32_t dtype) {
    int64_t steps = dtype == kBf16 ? steps_of<Bf16>(k) : k;
    int64_t bytes = k * (dtype == kBf16 ? 2 : 4);
    for (int64_t i = 0; i < m; ++i) {
        const uint32_t* panel = (const uint32_t*)packed + ids[i] / kPanel * steps * kPanel;
        char* row = (char*)y + i * bytes;
        for (int64_t step = 0; step < steps; ++step) {
            int64_t left = bytes - step * 4;
            memcpy(row + step * 4, panel + step * kPanel + ids[i] % kPanel, left < 4 ? left : 4);
        }
    }
}

}  // namespace
