// What is computed token by token: norms, rotary embedding with the write to the KV pool, SwiGLU.

#pragma once

#include "types.h"

namespace {

// 1 / root mean square. Four sums, by position in the row, so that additions overlap.
template <class Value>
inline float inverse_rms(const Value* x, int64_t n, float eps) {
    V16 sum[4] = {set1(0), set1(0), set1(0), set1(0)};
    for (int64_t i = 0; i < n; i += 16) {
        V16 value = load_up_to(x + i, n - i);
        sum[i / 16 % 4] = fma(value, value, sum[i / 16 % 4]);
    }
    float squares = sum_lanes(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
    return 1.0f / sqrtf(squares / (float)n + eps);
}

template <class T>
void rms_norm(const typename T::Value* x, const typename T::Value* weight, typename T::Value* y,
              int64_t m, int64_t n, float eps, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m * n > kSerialWork)
    for (int64_t row = 0; row < m; ++row) {
        const typename T::Value* from = x + row * n;
        V16 inverse = set1(inverse_rms(from, n, eps));
        for (int64_t i = 0; i < n; i += 16) {
            V16 scaled = mul(load_up_to(from + i, n - i), inverse);
            store_up_to(y + row * n + i, mul(scaled, load_up_to(weight + i, n - i)), n - i);
        }
    }
}

void rms_norm_any(const void* x, const void* weight, void* y, int64_t m, int64_t n, float eps,
                  int32_t dtype, int32_t threads) {
    if (dtype == kBf16)
        rms_norm<Bf16>((const uint16_t*)x, (const uint16_t*)weight, (uint16_t*)y, m, n, eps,
                       threads);
    else
        rms_norm<Fp32>((const float*)x, (const float*)weight, (float*)y, m, n, eps, threads);
}

// x / (1 + e^-x)
inline V16 silu(V16 x) { return div(x, add(set1(1.0f), exp16(sub(set1(0.0f), x)))); }

template <class T>
void silu_mul(const typename T::Value* x, typename T::Value* y, int64_t m, int64_t inner,
              int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m * inner > kSerialWork / 8)
    for (int64_t row = 0; row < m; ++row) {
        const typename T::Value* gate = x + row * 2 * inner;
        for (int64_t i = 0; i < inner; i += 16) {
            V16 open = silu(load_up_to(gate + i, inner - i));
            V16 up = load_up_to(gate + inner + i, inner - i);
            store_up_to(y + row * inner + i, mul(open, up), inner - i);
        }
    }
}

void silu_mul_any(const void* x, void* y, int64_t m, int64_t inner, int32_t dtype,
                  int32_t threads) {
    if (dtype == kBf16)
        silu_mul<Bf16>((const uint16_t*)x, (uint16_t*)y, m, inner, threads);
    else
        silu_mul<Fp32>((const float*)x, (float*)y, m, inner, threads);
}

// The angle is an fp32 product as in training; its cosine is taken in double precision, one at a
// time, so that neither a vector library nor its tails have a say.
void angles(const float* frequencies, const int64_t* positions, float factor, float* cosines,
            float* sines, int64_t m, int64_t half, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m * half > kSerialWork / 64)
    for (int64_t row = 0; row < m; ++row)
        for (int64_t i = 0; i < half; ++i) {
            double angle = (float)positions[row] * frequencies[i];
            cosines[row * half + i] = (float)cos(angle) * factor;
            sines[row * half + i] = (float)sin(angle) * factor;
        }
}

// Norm (with `weight`, if any) and rotate one head; dimension i turns with i + dim / 2.
template <class Value>
inline void rotate(const Value* x, const Value* weight, float eps, const float* cosines,
                   const float* sines, int64_t dim, Value* y) {
    int64_t half = dim / 2;
    V16 inverse = set1(weight ? inverse_rms(x, dim, eps) : 1.0f);
    for (int64_t i = 0; i < half; i += 16) {
        int64_t count = half - i;
        V16 a = load_up_to(x + i, count), b = load_up_to(x + half + i, count);
        if (weight) {
            a = mul(mul(a, inverse), load_up_to(weight + i, count));
            b = mul(mul(b, inverse), load_up_to(weight + half + i, count));
        }
        V16 c = load_up_to(cosines + i, count), s = load_up_to(sines + i, count);
        store_up_to(y + i, sub(mul(a, c), mul(b, s)), count);
        store_up_to(y + half + i, add(mul(b, c), mul(a, s)), count);
    }
}

// Where K of a slot of layer `index` lies; V is `block_size * kv_heads * head_dim` further on.
template <class Value>
inline Value* key_at(const Step& s, int64_t index, int64_t block, int64_t offset) {
    int64_t width = s.kv_heads * s.head_dim;
    return (Value*)s.kv + block * s.block_stride + (index * 2 * s.block_size + offset) * width;
}

template <class T>
void rope_write(const Layer& layer, const Step& s, int64_t index) {
    typedef typename T::Value Value;
    int64_t dim = s.head_dim, width = s.kv_heads * dim;
    int64_t row_width = s.heads * dim + 2 * width;
    const Value *q_norm = (const Value*)layer.q_norm, *k_norm = (const Value*)layer.k_norm;
#pragma omp parallel for num_threads(s.threads) schedule(static) \
    if (s.tokens * row_width > kSerialWork)
    for (int64_t t = 0; t < s.tokens; ++t) {
        Value* row = (Value*)s.qkv + t * row_width;
        const float *cosines = s.cos + t * (dim / 2), *sines = s.sin + t * (dim / 2);
        for (int64_t h = 0; h < s.heads; ++h)
            rotate(row + h * dim, q_norm, s.eps, cosines, sines, dim, row + h * dim);
        const Value* k = row + s.heads * dim;
        Value* to = key_at<Value>(s, index, s.slots[t] / s.block_size, s.slots[t] % s.block_size);
        for (int64_t h = 0; h < s.kv_heads; ++h)
            rotate(k + h * dim, k_norm, s.eps, cosines, sines, dim, to + h * dim);
        memcpy(to + s.block_size * width, k + width, (size_t)width * sizeof(Value));
    }
}

void rope_write_any(const Layer* layer, const Step* step, int64_t index) {
    if (step->dtype == kBf16)
        rope_write<Bf16>(*layer, *step, index);
    else
        rope_write<Fp32>(*layer, *step, index);
}

}  // namespace
