// Ragged attention over the paged KV pool: one kernel for prefill, chunks and decode.
//
// The work is cut into items: query rows of one sequence (a row is one head of one token) under a
// range of KV heads. An item walks its context in blocks of kContext tokens, which begin at
// multiples of kContext whatever the pool's block size, with a running softmax a row (Dao et al.,
// FlashAttention, arXiv:2205.14135). The context is cut into segments at multiples of kSegment;
// each has a softmax of its own, and these are merged in order of position. So what a row comes to
// depends on its own position alone, and not on its neighbours, nor on how many items share a
// long context. What a row does not see weighs nothing, and adding nothing changes no bit.

#pragma once

#include "attention_frame.h"
#ifdef __AMX_BF16__
#include "attention_few.h"
#include "attention_tiles.h"
#endif

namespace {

// Scores of the rows under head h with the block's tokens, not scaled yet.
template <class T>
inline void score(const Walk& w, const Context& block, int64_t h, Scratch& c) {
    int64_t steps = steps_of<T>(w.s.head_dim), tokens = rounded<T>(block.count);
    lay_out_keys<T>(w, block, h, tokens, c);
    for (int64_t r = 0; r < w.item.rows; r += kWideRows) {
        int64_t row = h * w.item.rows + r;
        int64_t rows = w.item.rows - r < kWideRows ? w.item.rows - r : kWideRows;
        products<T, kWideRows, kWide, kContext>(rows, (const char*)(c.queries + row * steps),
                                                steps * 4, c.keys, w.s.head_dim, tokens,
                                                c.scores + row * kContext, kContext);
    }
}

// V of kPack tokens of a block as words, 32 columns of them: laid out in c.values, or from where
// they lie in the pool.
template <class T>
struct LaidOut {
    const uint32_t* values;
    int64_t width;
    void get(int64_t step, int64_t at, W16* two) const {
        two[0] = load_words(values + step * width + at);
        two[1] = load_words(values + step * width + at + 16);
    }
};
template <class T>
struct InPool {
    typedef typename T::Value Value;
    const Context& block;
    int64_t h;
    int64_t to_value;
    __attribute__((always_inline)) void get(int64_t step, int64_t at, W16* two) const {
        const Value* rows[T::kPack];
        for (int64_t i = 0; i < T::kPack; ++i) {
            rows[i] = (const Value*)block.values[step * T::kPack + i] + h * block.dim;
            block.ask<Value>(h, step * T::kPack + i, to_value + at);
        }
        T::load_columns(rows, at, two);
    }
};

// sums = sums * shrink + weights * values over steps from..to, for R rows and N vectors at `at`.
template <class T, int R, int N, class Values>
__attribute__((noinline)) void weigh(Scratch& c, const Values& values, int64_t row, int64_t at,
                                     int64_t width, int64_t from, int64_t to) {
    V16 sum[R][N];
    float* sums = c.segment.sums + row * width + at;
    const uint32_t* weights = c.weights + row * kContext;
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < N; ++v)
            sum[r][v] = mul(load(sums + r * width + v * 16), set1(c.shrink[row + r]));
    for (int64_t step = from; step < to; ++step) {
        W16 value[N];
        for (int v = 0; v < N; v += 2) values.get(step, at + v * 16, value + v);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < N; ++v)
                sum[r][v] = T::dot(sum[r][v], weights[r * kContext + step], value[v]);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < N; ++v) store(sums + r * width + v * 16, sum[r][v]);
}

template <class T, int R, class Values>
inline void weigh_rows(int64_t rows, Scratch& c, const Values& values, int64_t row, int64_t width,
                       int64_t from, int64_t to) {
    if constexpr (R > 0) {
        if (rows != R) return weigh_rows<T, R - 1>(rows, c, values, row, width, from, to);
        int64_t at = 0;
        for (; at + kWide * 16 <= width; at += kWide * 16)
            weigh<T, R, kWide>(c, values, row, at, width, from, to);
        for (; at < width; at += 32) weigh<T, R, 2>(c, values, row, at, width, from, to);
    }
}

template <class T, class Values>
inline void weigh_head(const Walk& w, const Values& values, int64_t h, Scratch& c) {
    for (int64_t r = 0; r < w.item.rows; r += kWideRows) {
        int64_t row = h * w.item.rows + r;
        int64_t rows = w.item.rows - r < kWideRows ? w.item.rows - r : kWideRows;
        int64_t first = kContext, last = 0;
        for (int64_t i = row; i < row + rows; ++i) {
            if (c.from[i] < first) first = c.from[i];
            if (c.to[i] > last) last = c.to[i];
        }
        if (first < last)
            weigh_rows<T, kWideRows>(rows, c, values, row, w.width, first / T::kPack,
                                     (last + T::kPack - 1) / T::kPack);
    }
}

// Weighted sums of the rows under head h. V is laid out once if it will be read more than once.
template <class T>
inline void gather(const Walk& w, const Context& block, int64_t h, Scratch& c) {
    if (w.item.rows <= kWideRows && w.s.head_dim % 32 == 0)
        return weigh_head<T>(w, InPool<T>{block, h, w.to_value()}, h, c);
    lay_out_values<T>(w, block, h, block.count, c);
    weigh_head<T>(w, LaidOut<T>{c.values, w.width}, h, c);
}

// Takes a block of the context into the running softmax.
template <class T>
inline void attend_block(const Walk& w, const Context& block, Scratch& c) {
#ifdef __AMX_BF16__
    if constexpr (kInTiles<T>)
        return is_few(w) ? attend_block_of_few(w, block, c) : attend_block_in_tiles(w, block, c);
#endif
    int64_t tokens = rounded<T>(block.count);
    for (int64_t h = 0; h < w.item.heads; ++h) score<T>(w, block, h, c);
    raise_most(c, 0, w.rows(), c.scores, tokens, w.s.scale);
    soften<T>(c, 0, w.rows(), c.scores, c.weights, tokens, w.s.scale);
    for (int64_t h = 0; h < w.item.heads; ++h) gather<T>(w, block, h, c);
}

// The softmax over one segment, to c.segment.
template <class T>
void walk_segment(const Walk& w, const Walk& next, int64_t segment, Scratch& c) {
    typedef typename T::Value Value;
    clear(c.segment, w.rows(), w.width);
    int64_t first = segment * kSegment, limit = first + kSegment;
    if (first < w.seen) first = w.first_block();
    if (limit > w.end) limit = w.end;
    Context block;
    block.begin<Value>(w, next, first);
    for (int64_t at = first; at < limit; at += kContext) {
        if (at > first) block.advance<Value>(w, next, at);
        for (int64_t r = 0; r < w.item.rows; ++r) {
            int64_t position = w.position(r);
            int64_t from = w.layer.window ? position - w.layer.window + 1 - at : 0;
            int64_t to = position + 1 - at;
            bool none = to <= 0 || from >= kContext;
            c.from[r] = none ? kContext : from > 0 ? from : 0;
            c.to[r] = none ? 0 : to < kContext ? to : kContext;
        }
        for (int64_t r = w.item.rows; r < w.rows(); ++r) {  // under the other heads alike
            c.from[r] = c.from[r - w.item.rows];
            c.to[r] = c.to[r - w.item.rows];
        }
        attend_block<T>(w, block, c);
    }
}

// c.whole and c.segment, which comes behind it, to c.whole.
inline void merge(Scratch& c, int64_t rows, int64_t width) {
    Running &x = c.whole, &y = c.segment;
    float old_share[kTileRows], new_share[kTileRows];
    for (int64_t r = 0; r < rows; r += 16) {
        V16 a = load(x.most + r), b = load(y.most + r), most = max(a, b);
        V16 old = exp2_16(sub(a, most)), fresh = exp2_16(sub(b, most));
        store(old_share + r, old);
        store(new_share + r, fresh);
        store(x.most + r, most);
        store(x.total + r, add(mul(load(x.total + r), old), mul(load(y.total + r), fresh)));
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = r * width; d < (r + 1) * width; d += 16)
            store(x.sums + d, add(mul(load(x.sums + d), set1(old_share[r])),
                                  mul(load(y.sums + d), set1(new_share[r]))));
}

template <class T>
void finish(const Walk& w, Scratch& c) {
    typedef typename T::Value Value;
    int64_t dim = w.s.head_dim, token;
    for (int64_t r = 0; r < w.rows(); ++r) {
        int64_t head = w.query(r, &token);
        Value* out = (Value*)w.s.attended + (token * w.s.heads + head) * dim;
        V16 total = set1(c.whole.total[r]);
        for (int64_t d = 0; d < dim; d += 16)
            store_up_to(out + d, div(load(c.whole.sums + r * w.width + d), total), dim - d);
    }
}

// Floats that the softmax of one segment takes among the partial ones.
inline int64_t partial_size(const Walk& w) { return w.rows() * (w.width + 2); }

// The item's queries as words, to c.queries: [rows][words], or as few rows want them.
template <class T>
void lay_out_queries(const Walk& w, Scratch& c) {
#ifdef __AMX_BF16__
    if constexpr (kInTiles<T>)
        if (is_few(w)) return turn_queries(w, c);
#endif
    typedef typename T::Value Value;
    int64_t dim = w.s.head_dim, steps = steps_of<T>(dim), words = words_of<T>(dim), token;
    int64_t row_width = (w.s.heads + 2 * w.s.kv_heads) * dim;
    for (int64_t r = 0; r < w.rows(); ++r) {
        int64_t head = w.query(r, &token);
        const Value* q = (const Value*)w.s.qkv + token * row_width + head * dim;
        memcpy(c.queries + r * words, q, (size_t)steps * 4);
        memset(c.queries + r * words + steps, 0, (size_t)(words - steps) * 4);
    }
    memset(c.keys + steps * kContext, 0, (size_t)((words - steps) * kContext) * 4);
}

template <class T>
void attend_item(const Walk& w, const Walk& next, float* partials, Scratch& c) {
    int64_t rows = w.rows();
    lay_out_queries<T>(w, c);
    bool shared = w.item.partial >= 0;
    clear(c.whole, rows, w.width);
    for (int64_t i = w.item.first_segment; i < w.item.last_segment; ++i) {
        walk_segment<T>(w, next, i, c);
        if (shared) {
            float* to = partials + w.item.partial + i * partial_size(w);
            memcpy(to, c.segment.most, (size_t)rows * 4);
            memcpy(to + rows, c.segment.total, (size_t)rows * 4);
            memcpy(to + 2 * rows, c.segment.sums, (size_t)(rows * w.width) * 4);
        } else {
            merge(c, rows, w.width);
        }
    }
    if (!shared) finish<T>(w, c);
}

// Bring together what the items of a shared context left.
template <class T>
void join(const Walk& w, const float* partials, Scratch& c) {
    int64_t rows = w.rows();
    clear(c.whole, rows, w.width);
    for (int64_t i = w.item.first_segment; i < w.item.last_segment; ++i) {
        const float* from = partials + w.item.partial + i * partial_size(w);
        memcpy(c.segment.most, from, (size_t)rows * 4);
        memcpy(c.segment.total, from + rows, (size_t)rows * 4);
        memcpy(c.segment.sums, from + 2 * rows, (size_t)(rows * w.width) * 4);
        merge(c, rows, w.width);
    }
    finish<T>(w, c);
}

// How a step's attention is cut into items: about twice as many as threads, if there is so much to
// do; no more than needed, since KV heads that lie side by side are best read together.
struct Items {
    Item* items;
    int64_t count = 0;
    Item* joins;  // a context that several items share, with all its segments
    int64_t num_joins = 0;
    int64_t num_partials = 0;  // floats

    Items(const Layer& layer, const Step& s, int64_t index, int64_t wanted) {
        int64_t group = s.heads / s.kv_heads, tiles = 0;
        double work = 0;
        for (int64_t b = 0; b < s.sequences; ++b) {
            int64_t rows = (s.query_starts[b + 1] - s.query_starts[b]) * group;
            tiles += (rows + kTileRows - 1) / kTileRows;
            work += (double)(rows * s.context_lens[b]);
        }
        items = new Item[(size_t)(tiles * (s.kv_heads + 1) + wanted)];
        joins = new Item[(size_t)(tiles * s.kv_heads)];
        for (int64_t b = 0; b < s.sequences; ++b) {
            int64_t all = (s.query_starts[b + 1] - s.query_starts[b]) * group;
            for (int64_t row = 0; row < all; row += kTileRows) {
                int64_t rows = all - row < kTileRows ? all - row : kTileRows;
                double share = (double)(rows * s.context_lens[b]) / work;
                cut(Walk(layer, s, index, {b, row, rows, 0, s.kv_heads, 0, 0, -1}),
                    (int64_t)ceil((double)wanted * share));
            }
        }
    }
    ~Items() {
        delete[] items;
        delete[] joins;
    }

private:
    // In about `pieces` parts: by KV heads first, then by segments.
    void cut(const Walk& all, int64_t pieces) {
        int64_t kv_heads = all.s.kv_heads, rows = all.item.rows;
        int64_t by_head = pieces < kv_heads ? pieces : kv_heads, fit = kTileRows / rows;
        if (by_head * fit < kv_heads) by_head = (kv_heads + fit - 1) / fit;
        int64_t first = all.seen / kSegment, last = (all.end + kSegment - 1) / kSegment;
        int64_t by_segment = pieces / by_head < last - first ? pieces / by_head : last - first;
        for (int64_t i = 0; i < by_head; ++i) {
            Item item = all.item;
            item.kv_head = kv_heads * i / by_head;
            item.heads = kv_heads * (i + 1) / by_head - item.kv_head;
            item.first_segment = first;
            item.last_segment = last;
            if (by_segment <= 1) {
                items[count++] = item;
                continue;
            }
            item.partial = num_partials;
            num_partials += last * item.heads * rows * (all.width + 2);
            joins[num_joins++] = item;
            for (int64_t j = 0; j < by_segment; ++j) {
                item.first_segment = first + (last - first) * j / by_segment;
                item.last_segment = first + (last - first) * (j + 1) / by_segment;
                items[count++] = item;
            }
        }
    }
};

template <class T>
void attend(const Layer& layer, const Step& s, int64_t index) {
    int64_t positions = 0;
    for (int64_t b = 0; b < s.sequences; ++b)
        positions += (s.query_starts[b + 1] - s.query_starts[b]) * s.context_lens[b];
    bool large = s.threads > 1 && positions * s.heads * s.head_dim > 4 * kSerialWork;
    Items cut(layer, s, index, large ? 2 * s.threads : 1);
    float* partials = cut.num_partials ? new float[(size_t)cut.num_partials] : nullptr;
#pragma omp parallel num_threads(s.threads) if (large)
    {
        Scratch c;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < cut.count; ++i) {
            // What this thread will most likely do next.
            int64_t next = i + s.threads < cut.count ? i + s.threads : i;
            attend_item<T>(Walk(layer, s, index, cut.items[i]),
                           Walk(layer, s, index, cut.items[next]), partials, c);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < cut.num_joins; ++i)
            join<T>(Walk(layer, s, index, cut.joins[i]), partials, c);
    }
    delete[] partials;
}

void attend_any(const Layer* layer, const Step* step, int64_t index) {
    if (step->dtype == kBf16)
        attend<Bf16>(*layer, *step, index);
    else
        attend<Fp32>(*layer, *step, index);
}

}  // namespace
