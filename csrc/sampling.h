// Draws from logits: temperature, top_k, top_p, min_p and one uniform number a row.
//
// What a draw is stands in `model/sampler.py`: fp64, and sums that are formed one addition after
// the other, in orders that cost a sort of the vocabulary. Here weights and sums are approximate,
// with a bound on what they may differ from those by. A token is named only if no difference
// within the bound could have led to another; else the row is kUnsure, and the caller draws it as
// the definition says. So the tokens are the same on every instruction set, and no bit of a sum is
// part of the numerics. The bound is about 4e-11 of the total for a vocabulary of 32,000: one draw
// in hundreds of thousands is unsure.
//
//     depth    largest logit - logit; rounded as by the definition, so that ties are the same ties
//     weight   e^(-depth / temperature); 0 once a filter has dropped the token

#pragma once

#include "types.h"

namespace {

constexpr int64_t kUnsure = -1;
constexpr int64_t kLanes = sizeof(Doubles) / 8;
constexpr int64_t kSumBlock = 256;  // tokens whose weights are summed up together
constexpr int64_t kFew = 32;        // tokens that are sorted
constexpr int kHalvings = 12, kRounds = 40;
// Tokens whose weights are further apart than by this part of them are in the same order by the
// definition, too: either side's are good to a third of it.
constexpr double kNear = 1e-11;
// Tokens that weigh less cannot be drawn with certainty, nor do all of them matter to a sum.
constexpr double kNothing = 0x1p-80;

typedef int64_t Longs __attribute__((vector_size(sizeof(Doubles))));
typedef float Floats __attribute__((vector_size(sizeof(Doubles) / 2)));

struct Row {
    const float* logits;  // [n]
    int64_t n;
    const Draw& draw;
    double* weights;  // [n, rounded up to kSumBlock]
    double* sums;     // of the weights of each block
    double total;     // of the weights
    double least;     // of all weights, before any filter
    // Room for some tokens with their weights, [n] and a vector more.
    int32_t* some_tokens;
    double* some_weights;

    double depth(int64_t i) const { return draw.largest - (double)logits[i]; }
    // How far a sum may be from the definition's, and a part of the total from its own: weights
    // differ by 1.5e-12, and n additions on both sides make n * 2^-52; all of it twice, for sum
    // and target, and twice again to be safe.
    double slack() const { return total * (1e-11 + 1e-15 * (double)n); }
};

inline double sum_lanes(Doubles x) {
    double sum = 0;
    for (int64_t i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
}

// Depths from token i on; infinite beyond the last.
inline Doubles depths(const Row& row, int64_t i) {
    Floats x;
    if (i + kLanes <= row.n) {
        memcpy(&x, row.logits + i, sizeof(x));
    } else {
        for (int64_t j = 0; j < kLanes; ++j) x[j] = i + j < row.n ? row.logits[i + j] : -INFINITY;
    }
    return row.draw.largest - __builtin_convertvector(x, Doubles);
}

// Of 2^x for |x| <= 1/2, fitted for the least relative error, 1.1e-12; 2^0 is 1.
constexpr double kPower[] = {1.0,
                             0.6931471805459335,
                             0.2402265069581299,
                             0.05550410941205933,
                             0.009618129159402558,
                             0.0013333450568000645,
                             0.00015403455852453838,
                             1.5310079402249296e-05,
                             1.3255224878668817e-06};

// 2^x for x <= 0, but never less than 2^-1000.
inline Doubles power(Doubles x) {
    const double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
    const Doubles none = {};
    x = x < -1000.0 ? none - 1000.0 : x;
    Doubles shifted = x + kRound, r = x - (shifted - kRound);
    Doubles sum = none + kPower[8];
    for (int i = 7; i >= 0; --i) sum = fma(sum, r, none + kPower[i]);
    return sum * (Doubles)(((Longs)shifted + 1023) << 52);
}

// Set the weights of tokens i..i + kLanes to `weight_of(i)`, for all i, and form their sums.
template <class WeightOf>
inline void weigh(Row& row, WeightOf weight_of) {
    row.total = 0;
    for (int64_t block = 0; block * kSumBlock < row.n; ++block) {
        Doubles sum = {};
        for (int64_t i = block * kSumBlock; i < row.n && i < (block + 1) * kSumBlock; i += kLanes) {
            Doubles weights = weight_of(i);
            memcpy(row.weights + i, &weights, sizeof(weights));
            sum += weights;
        }
        row.sums[block] = sum_lanes(sum);
        row.total += row.sums[block];
    }
}

inline Doubles load(const Row& row, int64_t i) {
    Doubles x;
    memcpy(&x, row.weights + i, sizeof(x));
    return x;
}

// Take the weight of all tokens that weigh less than `least`. False if one lies nearer to it than
// `width`, on whichever side.
inline bool drop(Row& row, double least, double width) {
    Longs near = {};
    weigh(row, [&](int64_t i) {
        Doubles x = load(row, i), off = x - least;
        near |= (off < width) & (off > -width);
        return (Doubles)((x >= least) & (Longs)x);
    });
    return !signs((Doubles)near);
}

// How much the tokens weigh together that weigh `least` or more; or how many they are.
template <bool kCounting>
inline double tally(const double* weights, int64_t count, double least) {
    const Doubles ones = Doubles{} + 1.0;
    Doubles sum = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        Doubles x;
        memcpy(&x, weights + i, sizeof(x));
        sum += (Doubles)((x >= least) & (Longs)(kCounting ? ones : x));
    }
    return sum_lanes(sum);
}

// Tokens that may be at a cut: all of a row, or those in its room for some.
struct Candidates {
    const double* weights;  // [count, rounded up to a vector]
    const int32_t* tokens;  // [count] or null: all of them
    int64_t count;
    double least;   // of their weights
    double most;
    double below;   // no other token weighs as much as this, but less than `beyond`
    double beyond;
    double before;  // measure of those beyond

    // To those that weigh `low` or more, but less than `high`.
    void narrow(double low, double high, Row& row) {
        int64_t kept = 0;
        least = high;
        most = low;
        for (int64_t i = 0; i < count; i += kLanes) {
            Doubles x;
            memcpy(&x, weights + i, sizeof(x));
            for (uint32_t in = signs((Doubles)((x >= low) & (x < high))); in; in &= in - 1) {
                int64_t j = i + __builtin_ctz(in);
                double weight = weights[j];
                least = weight < least ? weight : least;
                most = weight > most ? weight : most;
                row.some_tokens[kept] = tokens ? tokens[j] : (int32_t)j;
                row.some_weights[kept++] = weight;
            }
        }
        memset(row.some_weights + kept, 0, sizeof(Doubles));
        weights = row.some_weights;
        tokens = row.some_tokens;
        count = kept;
    }
};

// A cut is the greatest weight such that the tokens from it on measure `goal` together, by weight
// or by number.
struct Cut {
    double weight;  // of the tokens at the cut
    double before;  // measure of those that are heavier
    double upto;    // and of those that weigh as much
};

// Narrow all of a row, of which what weighs `low` or more measures `goal`, to few tokens or to
// tokens of one weight, the cut among them. The range of weights that it can be in is halved, in a
// logarithmic scale, until it holds few of the candidates, and the others are left out; and so on.
template <bool kCounting>
inline Candidates search(Row& row, double low, double goal) {
    Candidates c = {row.weights, nullptr, row.n, low, 1.0, low, INFINITY, 0};
    if (row.least >= low) {
        c.least = row.least;
        c.below = 0;
    }
    double upto = kCounting ? (double)row.n : row.total;  // measure of what weighs `low` or more
    for (int round = 0; round < kRounds; ++round) {
        double high = c.most * (1 + 0x1p-51), before = c.before;
        low = c.least;
        for (int i = 0; i < kHalvings && c.least < c.most; ++i) {
            double number = (upto - before) / (kCounting ? 1 : low);  // there are no more between
            if (16 * number < (double)c.count) break;
            // Beside the mean: among tied weights, which are powers of one number, that is a third.
            double middle = 0.93 * sqrt(low * high) + 0.07 * low;
            double found = c.before + tally<kCounting>(c.weights, c.count, middle);
            if (found >= goal) {
                low = c.below = middle;
                upto = found;
            } else {
                high = c.beyond = middle;
                before = found;
            }
        }
        c.before = before;
        c.narrow(low, high, row);
        if (c.count <= kFew || c.least == c.most) break;
    }
    return c;
}

inline void sort_by_depth(const Row& row, int32_t* tokens, int64_t count) {
    for (int64_t j = 1; j < count; ++j) {
        int32_t moved = tokens[j];
        int64_t to = j;
        for (; to > 0 && row.depth(tokens[to - 1]) > row.depth(moved); --to)
            tokens[to] = tokens[to - 1];
        tokens[to] = moved;
    }
}

// False if it is not sure which tokens are on which side of the cut.
template <bool kCounting>
inline bool find_cut(Row& row, double low, double goal, Cut* cut) {
    Candidates c = search<kCounting>(row, low, goal);
    const int32_t* tokens = row.some_tokens;
    if (c.count <= kFew) sort_by_depth(row, row.some_tokens, c.count);
    double width = kNear * row.draw.temperature, before = c.before;
    for (int64_t j = 0, next; j < c.count; j = next) {
        double depth = row.depth(tokens[j]);
        *cut = {row.weights[tokens[j]], before, before};
        for (next = j; next < c.count && row.depth(tokens[next]) == depth; ++next)
            cut->upto += kCounting ? 1 : cut->weight;
        if (next < c.count && c.count > kFew) return false;  // one weight of unlike depths
        if (cut->upto >= goal) {
            if (j > 0 && depth - row.depth(tokens[j - 1]) < width) return false;
            if (next < c.count && row.depth(tokens[next]) - depth < width) return false;
            return c.below < cut->weight * (1 - kNear) && c.beyond > cut->weight * (1 + kNear);
        }
        before = cut->upto;
    }
    return false;
}

// What the filters leave, to row.weights; false if that is not sure.
inline bool filter(Row& row) {
    const Draw& d = row.draw;
    Cut cut;
    if (d.top_k > 0 && d.top_k < row.n &&
        tally<true>(row.weights, row.n, kNothing) > (double)d.top_k) {
        if (!find_cut<true>(row, kNothing, (double)d.top_k, &cut)) return false;
        drop(row, cut.weight, 0);
    }
    if (d.top_p < 1) {
        double goal = d.top_p * row.total, slack = row.slack();
        // All from the cut on weigh (1 - top_p) or more, so the first of them an n-th of that.
        double least = (1 - d.top_p) * row.total / (double)(2 * row.n);
        if (!find_cut<false>(row, least, goal, &cut)) return false;
        if (cut.before > 0 && cut.before >= goal - slack) return false;
        if (cut.upto <= goal + slack) return false;
        drop(row, cut.weight, 0);
    }
    return d.min_p <= 0 || drop(row, d.min_p, d.min_p * kNear);
}

// The token in whose interval of the running sum `number` of the total falls.
inline int64_t pick(const Row& row, double number) {
    double target = number * row.total, slack = row.slack(), before = 0;
    int64_t block = 0;
    while ((block + 1) * kSumBlock < row.n && before + row.sums[block] <= target)
        before += row.sums[block++];
    for (int64_t i = block * kSumBlock; i < row.n; ++i) {
        double after = before + row.weights[i];
        if (after > target)
            return target - before > slack && after - target > slack ? i : kUnsure;
        before = after;
    }
    return kUnsure;
}

// A number strictly between 0 and 1: the first word of Philox 4x64-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3") for the key (seed, choice) and the counter position + 1.
inline double uniform(uint64_t seed, uint64_t choice, uint64_t position) {
    uint64_t x0 = position + 1, x1 = 0, x2 = 0, x3 = 0;
    for (int round = 0; round < 10; ++round) {
        unsigned __int128 low = (unsigned __int128)0xD2E7470EE14C6C93u * x0;
        unsigned __int128 high = (unsigned __int128)0xCA5A826395121157u * x2;
        x0 = (uint64_t)(high >> 64) ^ x1 ^ seed;
        x1 = (uint64_t)high;
        x2 = (uint64_t)(low >> 64) ^ x3 ^ choice;
        x3 = (uint64_t)low;
        seed += 0x9E3779B97F4A7C15u;
        choice += 0xBB67AE8584CAA73Bu;
    }
    return ((double)(x0 >> 11) + 0.5) * 0x1p-53;
}

inline int64_t draw_row(Row& row) {
    const Draw& d = row.draw;
    double rate = -1.4426950408889634 / d.temperature;  // e^x = 2^(x log2 e)
    if (!(rate > -1e300)) return kUnsure;
    Doubles least = Doubles{} + 1.0;
    weigh(row, [&](int64_t i) {
        Doubles weights = power(depths(row, i) * rate);
        least = weights < least ? weights : least;
        return weights;
    });
    row.least = 1;
    for (int64_t i = 0; i < kLanes; ++i) row.least = least[i] < row.least ? least[i] : row.least;
    return filter(row) ? pick(row, uniform(d.seed, d.choice, (uint64_t)d.position)) : kUnsure;
}

void draw(const float* logits, int64_t stride, int64_t vocab, const Draw* draws, int64_t* tokens,
          int64_t count, int32_t threads) {
    int64_t blocks = (vocab + kSumBlock - 1) / kSumBlock;
// Always as many threads or one: where their number changes, OpenMP starts them anew.
#pragma omp parallel num_threads(threads) if (count > 1)
    {
        int64_t size = blocks * kSumBlock;
        double* room = new double[(size_t)(2 * size + blocks + kLanes)];
        int32_t* some_tokens = new int32_t[(size_t)vocab];
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; ++i) {
            const float* row = logits + draws[i].row * stride;
            double *weights = room, *sums = room + size, *some = sums + blocks;
            Row r = {row, vocab, draws[i], weights, sums, 0, 0, some_tokens, some};
            tokens[i] = draw_row(r);
        }
        delete[] some_tokens;
        delete[] room;
    }
}

}  // namespace
