// One instruction set's kernels against the portable ones, for a processor that is only emulated.
//
//     check_kernels ISA [FILE]
//
// Prints for each function how far the two are apart, and checks that rows have the same bits in
// any company, in any chunks and under any number of threads. Writes all results to FILE: where
// those of two instruction sets are the same file, so are their bits. Exit code 1: a check failed.
// `make neon` compiles and runs it.

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

typedef std::vector<uint8_t> Bytes;

const Kernels *ours, *portable;
FILE* file;
bool failed = false;

uint64_t state = 88172645463325252u;
float uniform() {  // -1..1
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (float)(int32_t)(state >> 32) * 0x1p-31f;
}

size_t size_of(int32_t dtype) { return dtype == kBf16 ? 2 : 4; }

float value_at(const Bytes& x, size_t i, int32_t dtype) {
    uint32_t bits = 0;
    if (dtype == kBf16)
        memcpy((char*)&bits + 2, &x[i * 2], 2);
    else
        memcpy(&bits, &x[i * 4], 4);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

Bytes random_values(int64_t count, int32_t dtype, float scale = 1, float shift = 0) {
    Bytes x((size_t)count * size_of(dtype));
    for (int64_t i = 0; i < count; ++i) {
        float value = (uniform() + uniform() + uniform()) * scale + shift;
        if (dtype == kBf16)
            memcpy(&x[(size_t)i * 2], (char*)&value + 2, 2);  // cut off, not rounded: no matter
        else
            memcpy(&x[(size_t)i * 4], &value, 4);
    }
    return x;
}

void check(bool good, const std::string& what) {
    if (good) return;
    printf("FAILED: %s\n", what.c_str());
    failed = true;
}

// `found` and `expected` of a type; they may differ by `bound`, norm of the error to norm.
void compare(const std::string& what, const Bytes& found, const Bytes& expected, int32_t dtype,
             double bound) {
    if (file) fwrite(found.data(), 1, found.size(), file);
    double error = 0, norm = 0;
    for (size_t i = 0; i < found.size() / size_of(dtype); ++i) {
        double a = value_at(found, i, dtype), b = value_at(expected, i, dtype);
        error += (a - b) * (a - b);
        norm += b * b;
    }
    error = sqrt(error / norm);
    bool equal = found == expected;
    printf("%-44s %s %.1e\n", what.c_str(), equal ? "equal bits" : "close     ", error);
    check(equal || error < bound, what);  // NaN is not below
}

const char* name_of(int32_t dtype) { return dtype == kBf16 ? " bf16" : " fp32"; }
double bound_of(int32_t dtype) { return dtype == kBf16 ? 3e-3 : 2e-6; }

struct Matrix {
    Bytes weight, bias;
    Linear linear;
    Matrix(const Kernels* k, const Bytes& plain, int64_t n, int64_t depth, int32_t dtype)
        : bias(random_values(n, dtype)) {
        int64_t steps = dtype == kBf16 ? (depth + 1) / 2 : depth;
        weight.resize((size_t)((n + kPanel - 1) / kPanel * kPanel * steps * 4));
        k->pack(plain.data(), weight.data(), n, depth, dtype, 2);
        linear = {weight.data(), bias.data(), n, depth};
    }
};

void check_products(int32_t dtype) {
    for (int64_t n : {1, 33, 96})
        for (int64_t k : {1, 63, 160}) {
            Bytes plain = random_values(n * k, dtype);
            Matrix mine(ours, plain, n, k, dtype), theirs(portable, plain, n, k, dtype);
            theirs.linear.bias = mine.linear.bias;
            std::string at = name_of(dtype) + (" " + std::to_string(n)) + " x " + std::to_string(k);
            compare("pack" + at, mine.weight, theirs.weight, dtype, 0);
            int64_t ids[] = {n - 1, 0, n / 2}, m = 29;
            Bytes rows((size_t)(3 * k) * size_of(dtype)), same = rows;
            ours->embed(mine.weight.data(), ids, rows.data(), 3, k, dtype);
            portable->embed(theirs.weight.data(), ids, same.data(), 3, k, dtype);
            compare("embed" + at, rows, same, dtype, 0);

            Bytes x = random_values(m * k, dtype), residual = random_values(m * n, dtype);
            for (int32_t wide : {1, 0}) {
                int32_t type = wide ? kFp32 : dtype;
                Bytes y((size_t)(m * n) * size_of(type)), z = y, alone = y;
                const void* r = wide ? nullptr : residual.data();
                ours->linear(&mine.linear, x.data(), r, y.data(), m, wide, dtype, 3);
                portable->linear(&theirs.linear, x.data(), r, z.data(), m, wide, dtype, 1);
                compare((wide ? "linear, fp32 result" : "linear, with residual") + at, y, z, type,
                        wide ? 2e-6 : bound_of(dtype));
                for (int64_t i = 0, rest; i < m; i += rest) {
                    rest = i % 4 + 1 < m - i ? i % 4 + 1 : m - i;
                    const uint8_t* old = wide ? nullptr : &residual[(size_t)(i * n) * size_of(type)];
                    ours->linear(&mine.linear, &x[(size_t)(i * k) * size_of(dtype)], old,
                                 &alone[(size_t)(i * n) * size_of(type)], rest, wide, dtype, 1);
                }
                check(alone == y, "a row of linear is the same in any company" + at);
            }
        }
}

void check_rows(int32_t dtype) {
    for (int64_t n : {7, 100, 1536}) {
        int64_t m = 9;
        Bytes x = random_values(m * 2 * n, dtype, 6), weight = random_values(n, dtype);
        Bytes y((size_t)(m * n) * size_of(dtype)), z = y;
        std::string at = name_of(dtype) + (" " + std::to_string(n));
        ours->rms_norm(x.data(), weight.data(), y.data(), m, n, 1e-5f, dtype, 2);
        portable->rms_norm(x.data(), weight.data(), z.data(), m, n, 1e-5f, dtype, 1);
        compare("rms_norm" + at, y, z, dtype, bound_of(dtype));
        ours->silu_mul(x.data(), y.data(), m, n, dtype, 2);
        portable->silu_mul(x.data(), z.data(), m, n, dtype, 1);
        compare("silu_mul" + at, y, z, dtype, bound_of(dtype));
    }
}

// Two sequences of one layer, in a pool of blocks of 8 tokens: what `run` computes in chunks.
struct Sequences {
    static constexpr int64_t kHeads = 6, kKvHeads = 2, kBlockSize = 8, kBlocks = 96, kInner = 80;
    static constexpr int64_t kLengths[2] = {530, 45};
    int32_t dtype;
    int64_t dim, hidden, row;
    Bytes x, norms, qkv, o, gate_up, down;
    std::vector<int64_t> tables;

    Sequences(int32_t dtype, int64_t dim) : dtype(dtype), dim(dim), hidden(kHeads * dim) {
        row = (kHeads + 2 * kKvHeads) * dim;
        x = random_values((kLengths[0] + kLengths[1]) * hidden, dtype);
        norms = random_values(hidden, dtype, 0.2f, 1);
        qkv = random_values(row * hidden, dtype, 0.2f);
        o = random_values(hidden * hidden, dtype, 0.1f);
        gate_up = random_values(2 * kInner * hidden, dtype, 0.1f);
        down = random_values(hidden * kInner, dtype, 0.1f);
        for (int64_t i = 0; i < 2 * kBlocks; ++i) tables.push_back((i * 37 + 5) % (2 * kBlocks));
    }

    // The tokens' hidden states after one layer, and the KV pool; in chunks of `chunk` tokens.
    Bytes run(const Kernels* k, int64_t window, int64_t chunk, int32_t threads) {
        Matrix a(k, qkv, row, hidden, dtype), b(k, o, hidden, hidden, dtype);
        Matrix c(k, gate_up, 2 * kInner, hidden, dtype), d(k, down, hidden, kInner, dtype);
        for (Matrix* m : {&a, &b, &c, &d}) m->linear.bias = nullptr;
        const void* norm = norms.data();
        Layer layer = {norm,     a.linear, norm,     norm,  b.linear,
                       norm,     c.linear, d.linear, window};
        size_t size = size_of(dtype);
        Bytes out = x, kv((size_t)(2 * kBlocks * 2 * kBlockSize * kKvHeads * dim) * size);
        for (int64_t done = 0; done < kLengths[0]; done += chunk) {
            std::vector<int64_t> slots, starts = {0}, lens, positions;
            Bytes now;
            for (int64_t s = 0, base = 0; s < 2; base += kLengths[s++]) {
                int64_t end = done + chunk < kLengths[s] ? done + chunk : kLengths[s];
                for (int64_t t = done; t < end; ++t) {
                    int64_t block = tables[(size_t)(s * kBlocks + t / kBlockSize)];
                    slots.push_back(block * kBlockSize + t % kBlockSize);
                    positions.push_back(t);
                    uint8_t* from = &out[(size_t)((base + t) * hidden) * size];
                    now.insert(now.end(), from, from + (size_t)hidden * size);
                }
                starts.push_back((int64_t)slots.size());
                lens.push_back(end > done ? end : kLengths[s]);
            }
            int64_t tokens = (int64_t)slots.size();
            std::vector<float> frequencies, cosines((size_t)(tokens * dim / 2)), sines = cosines;
            for (int64_t i = 0; i < dim / 2; ++i)
                frequencies.push_back(powf(10000, -2.0f * (float)i / (float)dim));
            portable->angles(frequencies.data(), positions.data(), 1, cosines.data(),
                             sines.data(), tokens, dim / 2, 1);
            Bytes normed((size_t)(tokens * hidden) * size), attended = normed;
            Bytes mixed((size_t)(tokens * row) * size), inner((size_t)(tokens * kInner) * size);
            Bytes wide((size_t)(tokens * 2 * kInner) * size);
            Step step = {tokens, 2, slots.data(), starts.data(), lens.data(), tables.data(),
                         kBlocks, cosines.data(), sines.data(), kv.data(),
                         2 * kBlockSize * kKvHeads * dim, kBlockSize, kHeads, kKvHeads, dim,
                         1 / sqrtf((float)dim), 1e-5f, now.data(), normed.data(), mixed.data(),
                         attended.data(), wide.data(), inner.data(), dtype, threads};
            k->layer(&layer, &step, 0);
            const uint8_t* from = now.data();
            for (int64_t s = 0, base = 0; s < 2; base += kLengths[s++]) {
                size_t bytes = (size_t)((starts[(size_t)s + 1] - starts[(size_t)s]) * hidden) * size;
                if (bytes) memcpy(&out[(size_t)((base + done) * hidden) * size], from, bytes);
                from += bytes;
            }
        }
        out.insert(out.end(), kv.begin(), kv.end());
        return out;
    }
};

void check_layers(int32_t dtype) {
    for (int64_t dim : {24, 64, 96})
        for (int64_t window : {0, 100}) {
            Sequences s(dtype, dim);
            std::string at = name_of(dtype) + (", heads of " + std::to_string(dim));
            if (window) at += ", window";
            Bytes found = s.run(ours, window, 530, 3);
            compare("layer" + at, found, s.run(portable, window, 530, 1), dtype,
                    5 * bound_of(dtype));
            check(s.run(ours, window, 64, 1) == found, "chunks change no bit" + at);
            check(s.run(ours, window, 529, 2) == found, "decoding changes no bit" + at);
        }
}

void check_angles() {
    std::vector<int64_t> positions = {0, 1, 511, 8191, 131071};
    std::vector<float> frequencies;
    for (int i = 0; i < 48; ++i) frequencies.push_back(powf(10000, -(float)i / 48));
    Bytes found(5 * 48 * 2 * 4), expected(5 * 48 * 2 * 4);
    for (Bytes* bytes : {&found, &expected}) {
        const Kernels* k = bytes == &found ? ours : portable;
        float* to = (float*)bytes->data();
        k->angles(frequencies.data(), positions.data(), 1.25f, to, to + 5 * 48, 5, 48, 2);
    }
    compare("angles", found, expected, kFp32, 1e-7);
}

void check_draws() {
    int64_t vocab = 4099, count = 3000;
    std::vector<float> logits((size_t)vocab);
    for (float& logit : logits) logit = 4 * (uniform() + uniform() + uniform());
    double largest = *std::max_element(logits.begin(), logits.end());
    std::vector<Draw> draws;
    for (int64_t i = 0; i < count; ++i)
        draws.push_back({0, largest, 0.3 + (double)(i % 7) / 4, i % 3 ? 0.9 : 1.0,
                         i % 5 ? 0.0 : 0.01, i % 4 ? 0 : 40, 7, (uint64_t)(i % 2), i});
    std::vector<int64_t> found((size_t)count), expected((size_t)count);
    ours->draw(logits.data(), 0, vocab, draws.data(), found.data(), count, 3);
    portable->draw(logits.data(), 0, vocab, draws.data(), expected.data(), count, 1);
    if (file) fwrite(found.data(), 8, found.size(), file);
    std::vector<int64_t> sorted = found;
    std::sort(sorted.begin(), sorted.end());
    printf("%-44s equal bits\n", "draw");
    check(found == expected && sorted.front() >= 0 && sorted.back() > vocab / 2, "draw");
}

}  // namespace

int main(int count, char** words) {
    ours = count > 1 ? baton_kernels(words[1]) : nullptr;
    portable = baton_kernels("portable");
    if (!ours) {
        printf("no such instruction set here\n");
        return 1;
    }
    if (count > 2) file = fopen(words[2], "wb");
    for (int32_t dtype : {kBf16, kFp32}) {
        check_products(dtype);
        check_rows(dtype);
        check_layers(dtype);
    }
    check_draws();
    if (file) fclose(file);
    file = nullptr;  // cosines are a mathematics library's
    check_angles();
    printf("%s: %s\n", ours->isa, failed ? "FAILED" : "all checks passed");
    return failed;
}
