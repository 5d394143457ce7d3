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
    int64_t n = p.w->n;
    for (int64_t part = 0; part < kPanel; part += 16) {
        int64_t column = panel * kPanel + part, count = n - column;
        if (count <= 0) return;
        V16 bias = set1(0);
        if (p.w->bias) bias = load_up_to((const Value*)p.w->bias + column, count);
        for (int64_t r = 0; r < rows; ++r) {
            int64_t at = (row + r) * n + column;
            V16 value = add(load(sums + r * kPanel + part), bias);
            if (p.residual) value = add(value, load_up_to((const Value*)p.residual + at, count));
            if (p.wide)
                store_up_to((float*)p.y + at, value, count);
            else
                store_up_to((Value*)p.y + at, value, count);
        }
    }
}

}  // namespace
