// Causal attention of long rows, forwards and backwards, a block of queries against a block of keys at a time: weights
// are never kept, and those of a block stay in the cache of a core (Dao et al. 2022, FlashAttention).
//
// long_attention.py says what each function computes and builds this file when it is first needed. Scores lie keys by
// queries, so that maxima and sums over keys run along whole vectors. Numbers are fp32 or bf16 in memory; scores,
// softmax and sums are fp32; on tiles, factors of products are rounded to bf16. One thread computes one head of one
// row, so that no sum depends on the number of threads, and a row's result not on the other rows.
//
// Shapes: B rows of T positions, H query heads, K key heads, E head dimension, W the same in whole steps of 32, a block
// has S = 64 positions.

#include "panels.h"

// long_attention.py lays out the same fields in the same order, and `size_of` tells it whether it does.

struct LongAttention {
    int64_t batch, length, heads, kv_heads, head_dim;
    const float *cos, *sin;  // [tables, length, head_dim], the sine negative in the first half
    int64_t tables;          // batch, or 1 for all
    const int64_t *starts;   // [batch, length], the first key that a query may see; null: the first of all
    const int64_t *gaps;     // [batch, length, 2], keys after that which it may not see, begin and end; null: none
    const void *products;    // [batch, length, (heads + 2 kv_heads) head_dim]: queries, keys, values
    void *out;               // [batch, length, heads head_dim]
    float *log_sums;         // [batch, heads, length]: of the exponentials of a query's scores
    const void *grad;        // of out
    void *grad_products;
    float *grad_heads;  // [batch, heads, length, 2 head_dim]: gradients of keys and values for each query head
};

namespace {

constexpr float LOWEST = -1e30f, HIDDEN = -3e38f;
constexpr float ROOM = 8.0f;
constexpr int64_t STRIP = 32;

// One head of one row: where its numbers lie, and which keys its blocks of queries see.
template <class T> struct Head {
    const LongAttention &a;
    int64_t b, h, E, W, blocks, stride;
    float scale;

    Head(const LongAttention &a, int64_t index)
        : a(a), b(index / a.heads), h(index % a.heads), E(a.head_dim), W(round_up(E, 32)),
          blocks((a.length + SIDE - 1) / SIDE), stride((a.heads + 2 * a.kv_heads) * E),
          scale(1.0f / std::sqrt(float(E))) {}

    int64_t key_head() const { return a.heads + h / (a.heads / a.kv_heads); }
    int64_t value_head() const { return key_head() + a.kv_heads; }
    int64_t count(int64_t block) const { return std::min(SIDE, a.length - block * SIDE); }
    int64_t row(int64_t block) const { return b * a.length + block * SIDE; }
    int64_t angle(int64_t position) const { return ((a.tables > 1 ? b * a.length : 0) + position) * E; }
    float *log_sums(int64_t block) const { return a.log_sums + (b * a.heads + h) * a.length + block * SIDE; }

    // The first block of keys that any query of a block sees: documents begin one after another.
    int64_t first_block(int64_t block) const { return a.starts ? a.starts[row(block)] / SIDE : 0; }

    // Rows of fp32, padded with zeros, of head `from` of a matrix.
    void read(const void *matrix, int64_t width, int64_t from, int64_t block, float *to) const {
        const T *rows = static_cast<const T *>(matrix) + row(block) * width + from * E;
        for (int64_t s = 0; s < count(block); s++, to += W) {
#pragma omp simd
            for (int64_t e = 0; e < E; e++) to[e] = get(rows[s * width + e]);
            std::fill(to + E, to + W, 0.0f);
        }
        std::fill(to, to + (SIDE - count(block)) * W, 0.0f);
    }

    // Turns rows to the angles of their positions, or back.
    void rotate(int64_t block, float direction, float factor, float *rows) const {
        for (int64_t s = 0; s < count(block); s++, rows += W) {
            const float *cos = a.cos + angle(block * SIDE + s), *sin = a.sin + angle(block * SIDE + s);
#pragma omp simd
            for (int64_t e = 0; e < E / 2; e++) {
                float x = rows[e], y = rows[e + E / 2];
                rows[e] = (x * cos[e] + direction * y * sin[e]) * factor;
                rows[e + E / 2] = (y * cos[e + E / 2] + direction * x * sin[e + E / 2]) * factor;
            }
        }
    }

    void write(const float *rows, void *matrix, int64_t width, int64_t to, int64_t block) const {
        T *out = static_cast<T *>(matrix) + row(block) * width + to * E;
        for (int64_t s = 0; s < count(block); s++)
#pragma omp simd
            for (int64_t e = 0; e < E; e++) put(out[s * width + e], rows[s * W + e]);
    }

    // Whether some query of a block may not see some key of another.
    bool is_masked(int64_t keys, int64_t queries) const {
        return keys == queries || a.gaps || (a.starts && a.starts[row(queries) + count(queries) - 1] > keys * SIDE);
    }

    // Marks the scores of a key for the queries of a block that may not see it.
    void hide(int64_t key, int64_t queries, float *scores) const {
        for (int64_t q = 0; q < SIDE; q++) {
            const bool real = q < count(queries);
            const int64_t start = real && a.starts ? a.starts[row(queries) + q] : 0;
            const int64_t *gap = real && a.gaps ? a.gaps + 2 * (row(queries) + q) : nullptr;
            const bool in_gap = gap && key >= gap[0] && key < gap[1];
            if (key > queries * SIDE + q || key < start || in_gap) scores[q] = HIDDEN;
        }
    }
};

// ---- forwards ----

template <class T> struct Forward {
    using Panels = typename ChoosePanels<T>::Panels;
    using Number = typename Panels::Number;

    int64_t W, panel;  // numbers of a block
    std::vector<Number> keys, values, queries, weights;
    std::vector<float> rows, scores, out;
    float top[SIDE], total[SIDE], factor[SIDE];

    Forward(const LongAttention &a)
        : W(round_up(a.head_dim, 32)), panel(SIDE * W), keys(round_up(a.length, SIDE) * W), values(keys.size()),
          queries(panel), weights(SIDE * SIDE), rows(panel), scores(SIDE * SIDE), out(panel) {}

    void pack(const Head<T> &head, int64_t block) {
        std::vector<Number> pairs(panel);
        head.read(head.a.products, head.stride, head.key_head(), block, rows.data());
        head.rotate(block, 1.0f, 1.0f, rows.data());
        put_rows<Panels>(rows.data(), W, keys.data() + block * panel);
        head.read(head.a.products, head.stride, head.value_head(), block, rows.data());
        put_pairs<Panels>(rows.data(), W, pairs.data());
        Panels::turn(pairs.data(), W, values.data() + block * panel);
    }

    void operator()(const Head<T> &head) {
        for (int64_t block = 0; block < head.blocks; block++) pack(head, block);
        std::vector<Number> by_rows(panel);
        for (int64_t block = 0; block < head.blocks; block++) {
            head.read(head.a.products, head.stride, head.h, block, rows.data());
            head.rotate(block, 1.0f, head.scale, rows.data());
            put_rows<Panels>(rows.data(), W, by_rows.data());
            Panels::columns(by_rows.data(), W, queries.data());
            std::fill(top, top + SIDE, LOWEST);
            std::fill(total, total + SIDE, 0.0f);
            std::fill(out.begin(), out.end(), 0.0f);
            for (int64_t k = head.first_block(block); k <= block; k++) attend(head, k, block);
            finish(head, block);
        }
    }

    // Adds what a block of queries reads at a block of keys.
    void attend(const Head<T> &head, int64_t k, int64_t block) {
        float *s = scores.data();
        Panels::template multiply<false>(keys.data() + k * panel, queries.data(), s, SIDE, SIDE, W);
        const bool masked = head.is_masked(k, block);
        if (masked)
            for (int64_t i = 0; i < SIDE; i++) head.hide(k * SIDE + i, block, s + i * SIDE);
        int raised = 0;
        for (int64_t q = 0; q < SIDE; q += LANES) raised |= weigh(s + q, q, masked);
        if (raised) scale();
        Panels::template multiply<true>(values.data() + k * panel, weights.data(), out.data(), W, SIDE, SIDE);
    }

    // Makes weights of the scores of 16 queries. What is taken off a score is the first of the largest, until another
    // is larger by ROOM: so what was summed before is seldom scaled. Returns whether it must be.
    bool weigh(const float *s, int64_t q, bool masked) {
        Lanes best = load(s);
        for (int64_t i = 1; i < SIDE; i++) best = larger(load(s + i * SIDE), best);
        const Lanes before = load(top + q), now = best > before + ROOM ? best : before;
        const Lanes change = exponential(before - now);
        Lanes sum = load(total + q) * change;
        for (int64_t i = 0; i < SIDE; i += 2) {
            const Lanes x = load(s + i * SIDE), y = load(s + (i + 1) * SIDE);
            Lanes even = exponential(x - now), odd = exponential(y - now);
            if (masked) {
                even = x == HIDDEN ? Lanes{} : even;
                odd = y == HIDDEN ? Lanes{} : odd;
            }
            sum += even + odd;
            Panels::put_pair(even, odd, Panels::pair(weights.data(), i, q, SIDE), SIDE);
        }
        store(top + q, now);
        store(total + q, sum);
        store(factor + q, change);
        for (int64_t j = 0; j < LANES; j++)
            if (now[j] != before[j]) return true;
        return false;
    }

    void scale() {
        for (int64_t w = 0; w < W; w++)
            for (int64_t q = 0; q < SIDE; q += LANES) {
                float *x = out.data() + w * SIDE + q;
                store(x, load(x) * load(factor + q));
            }
    }

    void finish(const Head<T> &head, int64_t block) {
#pragma omp simd
        for (int64_t q = 0; q < SIDE; q++) factor[q] = 1.0f / total[q];
        scale();
        transpose(out.data(), W, SIDE, rows.data());
        head.write(rows.data(), head.a.out, head.a.heads * head.E, head.h, block);
        for (int64_t q = 0; q < head.count(block); q++) head.log_sums(block)[q] = top[q] + std::log(total[q]);
    }
};

// ---- backwards ----

// With P = softmax(S), S = q kᵀ: dv = Pᵀ g, dP = g vᵀ, dS = P (dP - Σ g out), dq = dS k, dk = dSᵀ q.

template <class T> struct Backward {
    using Panels = typename ChoosePanels<T>::Panels;
    using Number = typename Panels::Number;

    struct Sides {  // a block of queries or of gradients, as the right side of both products
        std::vector<Number> columns, pairs;
    };

    int64_t W, panel;
    Sides queries, grads;
    std::vector<Number> keys, turned_keys, values, weights, grad_scores, grad_pairs, by_rows;
    std::vector<float> rows, scores, grad_weights, grad_queries, grad_keys, grad_values, log_sums, along;

    Backward(const LongAttention &a) : W(round_up(a.head_dim, 32)), panel(SIDE * W) {
        const int64_t positions = round_up(a.length, SIDE);
        for (auto *all : {&queries.columns, &queries.pairs, &grads.columns, &grads.pairs}) all->resize(positions * W);
        for (auto *one : {&keys, &turned_keys, &values, &by_rows}) one->resize(panel);
        for (auto *one : {&rows, &grad_keys, &grad_values}) one->resize(panel);
        for (auto *one : {&weights, &grad_scores, &grad_pairs}) one->resize(SIDE * SIDE);
        for (auto *one : {&scores, &grad_weights}) one->resize(STRIP * SIDE);
        for (auto *one : {&log_sums, &along}) one->resize(positions);
        grad_queries.resize(positions * W);
    }

    void pack(Sides &to, int64_t block) {
        put_rows<Panels>(rows.data(), W, by_rows.data());
        Panels::columns(by_rows.data(), W, to.columns.data() + block * panel);
        put_pairs<Panels>(rows.data(), W, to.pairs.data() + block * panel);
    }

    void pack_queries(const Head<T> &head, int64_t block) {
        const int64_t width = head.a.heads * head.E;
        head.read(head.a.products, head.stride, head.h, block, rows.data());
        head.rotate(block, 1.0f, head.scale, rows.data());
        pack(queries, block);
        head.read(head.a.out, width, head.h, block, grad_keys.data());
        head.read(head.a.grad, width, head.h, block, rows.data());
        pack(grads, block);
        for (int64_t q = 0; q < SIDE; q++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t w = 0; w < W; w++) sum += grad_keys[q * W + w] * rows[q * W + w];
            along[block * SIDE + q] = sum;
            log_sums[block * SIDE + q] = q < head.count(block) ? head.log_sums(block)[q] : 0.0f;
        }
    }

    void pack_keys(const Head<T> &head, int64_t block) {
        head.read(head.a.products, head.stride, head.value_head(), block, rows.data());
        put_rows<Panels>(rows.data(), W, values.data());
        head.read(head.a.products, head.stride, head.key_head(), block, rows.data());
        head.rotate(block, 1.0f, 1.0f, rows.data());
        put_rows<Panels>(rows.data(), W, keys.data());
        put_pairs<Panels>(rows.data(), W, by_rows.data());
        Panels::turn(by_rows.data(), W, turned_keys.data());
    }

    void operator()(const Head<T> &head) {
        for (int64_t block = 0; block < head.blocks; block++) pack_queries(head, block);
        std::fill(grad_queries.begin(), grad_queries.end(), 0.0f);
        for (int64_t k = 0; k < head.blocks; k++) {
            pack_keys(head, k);
            std::fill(grad_keys.begin(), grad_keys.end(), 0.0f);
            std::fill(grad_values.begin(), grad_values.end(), 0.0f);
            for (int64_t block = k; block < head.blocks && head.first_block(block) <= k; block++)
                differentiate(head, k, block);
            write_keys(head, k);
        }
        for (int64_t block = 0; block < head.blocks; block++) {
            transpose(grad_queries.data() + block * panel, W, SIDE, rows.data());
            head.rotate(block, -1.0f, head.scale, rows.data());
            head.write(rows.data(), head.a.grad_products, head.stride, head.h, block);
        }
    }

    void differentiate(const Head<T> &head, int64_t k, int64_t block) {
        const int64_t right = block * panel;
        const bool masked = head.is_masked(k, block);
        for (int64_t i = 0; i < SIDE; i += STRIP) {
            float *s = scores.data(), *d = grad_weights.data();
            Panels::template multiply<false>(keys.data() + i * W, queries.columns.data() + right, s, STRIP, SIDE, W);
            Panels::template multiply<false>(values.data() + i * W, grads.columns.data() + right, d, STRIP, SIDE, W);
            if (masked)
                for (int64_t j = 0; j < STRIP; j++) head.hide(k * SIDE + i + j, block, s + j * SIDE);
            for (int64_t q = 0; q < SIDE; q += LANES) weigh(s + q, d + q, block * SIDE + q, i, q, masked);
        }
        Panels::template multiply<true>(weights.data(), grads.pairs.data() + right, grad_values.data(), SIDE, W, SIDE);
        Panels::template multiply<true>(grad_scores.data(), queries.pairs.data() + right, grad_keys.data(), SIDE, W,
                                        SIDE);
        Panels::template multiply<true>(turned_keys.data(), grad_pairs.data(), grad_queries.data() + right, W, SIDE,
                                        SIDE);
    }

    // Makes weights, and the gradients of their scores, of 16 queries at the keys from `first` on.
    void weigh(const float *s, const float *d, int64_t query, int64_t first, int64_t q, bool masked) {
        const Lanes sums = load(log_sums.data() + query), mean = load(along.data() + query);
        for (int64_t i = 0; i < STRIP; i += 2) {
            const Lanes x = load(s + i * SIDE), y = load(s + (i + 1) * SIDE);
            Lanes even = exponential(x - sums), odd = exponential(y - sums);
            if (masked) {
                even = x == HIDDEN ? Lanes{} : even;
                odd = y == HIDDEN ? Lanes{} : odd;
            }
            const int64_t at = (first + i) * SIDE + q;
            Panels::put_row(even, weights.data() + at);
            Panels::put_row(odd, weights.data() + at + SIDE);
            even *= load(d + i * SIDE) - mean;
            odd *= load(d + (i + 1) * SIDE) - mean;
            Panels::put_row(even, grad_scores.data() + at);
            Panels::put_row(odd, grad_scores.data() + at + SIDE);
            Panels::put_pair(even, odd, Panels::pair(grad_pairs.data(), first + i, q, SIDE), SIDE);
        }
    }

    void write_keys(const Head<T> &head, int64_t block) {
        float *to = head.a.grad_heads + ((head.b * head.a.heads + head.h) * head.a.length + block * SIDE) * 2 * head.E;
        for (int64_t s = 0; s < head.count(block); s++, to += 2 * head.E) {
            std::copy_n(grad_keys.data() + s * W, head.E, to);
            std::copy_n(grad_values.data() + s * W, head.E, to + head.E);
        }
    }
};

// Gradients of keys and values: sums over the query heads that share them.
template <class T> void share(const LongAttention &a) {
    const int64_t E = a.head_dim, G = a.heads / a.kv_heads, blocks = (a.length + SIDE - 1) / SIDE;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t bk = 0; bk < a.batch * a.kv_heads; bk++)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t h = bk % a.kv_heads * G;
            const Head<T> head(a, bk / a.kv_heads * a.heads + h);
            std::vector<float> keys(SIDE * head.W), values(SIDE * head.W);
            for (int64_t g = 0; g < G; g++)
                for (int64_t s = 0; s < head.count(block); s++) {
                    int64_t row = ((head.b * a.heads + h + g) * a.length + block * SIDE + s) * 2;
                    const float *from = a.grad_heads + row * E;
#pragma omp simd
                    for (int64_t e = 0; e < E; e++) {
                        keys[s * head.W + e] += from[e];
                        values[s * head.W + e] += from[E + e];
                    }
                }
            head.rotate(block, -1.0f, 1.0f, keys.data());
            head.write(keys.data(), a.grad_products, head.stride, head.key_head(), block);
            head.write(values.data(), a.grad_products, head.stride, head.value_head(), block);
        }
}

template <class T, template <class> class Pass> void each_head(const LongAttention &a) {
#pragma omp parallel
    {
        Tiles tiles(!std::is_same_v<typename Pass<T>::Number, float>);
        Pass<T> pass(a);
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < a.batch * a.heads; index++) pass(Head<T>(a, index));
    }
}

}  // namespace

#define EACH(NAME, T)                                                                  \
    void forward_##NAME(const LongAttention *a) { each_head<T, Forward>(*a); }         \
    void backward_##NAME(const LongAttention *a) {                                     \
        each_head<T, Backward>(*a);                                                    \
        share<T>(*a);                                                                  \
    }

extern "C" {
EACH(fp32, float)
EACH(bf16, bf16)
int64_t size_of_LongAttention() { return sizeof(LongAttention); }
}
