// What a product of rows with a weight matrix is made of, and its last step, the same for every
// kernel: bias, residual, rounding.

#pragma once

#include "types.h"

namespace {

struct Product {
    const Linear* w;
    const char* x;
    const char* residual;
    char* y;
    bool wide;
};

// Writes `rows` rows of y from `row` on, of a panel's columns, of which `sums` [rows][kPanel] are
// the products.
template <class T>
inline void finish_panel(const Product& p, const float* sums, int64_t row, int64_t rows,
                         int64_t panel) {
    typedef typename T::Value Value;
    constexpr int64_t kParts = kPanel / 16;
    int64_t n = p.w->n, first = panel * kPanel;
    V16 bias[kParts];
    for (int64_t i = 0; i < kParts; ++i) {
        int64_t column = first + i * 16;
        bias[i] = set1(0);
        if (p.w->bias && column < n)
            bias[i] = load_up_to((const Value*)p.w->bias + column, n - column);
    }
    // Row by row: rows of y often share one place in a cache, and none would still be there if
    // they were all gone through twice.
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < kParts; ++i) {
            int64_t column = first + i * 16, count = n - column, at = (row + r) * n + column;
            if (count <= 0) break;
            V16 value = add(load(sums + r * kPanel + i * 16), bias[i]);
            if (p.residual) value = add(value, load_up_to((const Value*)p.residual + at, count));
            if (p.wide)
                store_up_to((float*)p.y + at, value, count);
            else
                store_up_to((Value*)p.y + at, value, count);
        }
}

}  // namespace
