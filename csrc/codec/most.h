// The greatest magnitudes of groups of elements.

#pragma once

#include "types.h"

namespace {

// The greatest magnitude of `dim` elements.
template <class T, class Dim>
inline typename T::Bits most_of(const typename T::Bits* x, Dim dim) {
#if defined(BATON_LANES)
    if (dim % kLanes == 0) return most_in_lanes(x, dim);
#endif
    typename T::Bits most = 0;
    for (int64_t i = 0; i < dim; ++i) {
        typename T::Bits found = magnitude<T>(x[i]);
        most = found > most ? found : most;
    }
    return most;
}

// The greatest magnitude of each of n columns over `rows` rows.
template <class T>
inline void most_of_columns(const typename T::Bits* x, int64_t rows, int64_t stride, int64_t n,
                            typename T::Bits* __restrict most) {
    int64_t at = 0;
#if defined(BATON_LANES)
    for (; at + kLanes <= n; at += kLanes) most_of_lanes(x + at, rows, stride, most + at);
#endif
    memset(most + at, 0, (size_t)(n - at) * sizeof(*most));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = at; i < n; ++i) {
            typename T::Bits found = magnitude<T>(x[row * stride + i]);
            most[i] = found > most[i] ? found : most[i];
        }
}

}  // namespace
