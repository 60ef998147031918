// One step of a Llama on a CPU: a token of each row in, logits out, all layers in one call. Rows are sequences of which
// each gets its newest token, or the tokens of prompts.
//
// PyTorch spends most of such a step on starting operations and on weights in an order that suits large products. Here
// weights lie in the order in which they are read, and products run on tiles (AMX), on pairs of bf16 (AVX-512), or on
// plain vectors, whichever the processor has. cpu_decoder.py packs the weights, says what is computed, and builds this
// file.
//
// Numbers are fp32 or bf16 (T) in memory, weights also integers (W) of 8 bits with a scale for each output or of 4
// bits with a scale for each 32 inputs; sums, norms, softmax and the residual stream are fp32. A row's result does not
// depend on the other rows of its step, to the last bit.
//
// Shapes: B rows, D hidden, F feed-forward, H query heads, K key heads, G = H / K, E head dimension, V vocabulary,
// S columns of the cache. A packed matrix is [outputs / 16][inputs / pair][16][pair], zeros where sizes do not divide.

#include "attention.h"

#include <omp.h>
#include <utility>

namespace {

constexpr int64_t SHARED_ROWS = 16;  // with fewer rows, the heads of a row are shared among threads

inline int64_t blocks(int64_t outputs) { return (outputs + LANES - 1) / LANES; }

template <class W> Matrix<W> matrix(const PackedMatrix &p) { return {static_cast<const W *>(p.packed), p.scales}; }

template <class T> void normalise(const float *x, const float *weight, int64_t D, float eps, T *out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; d++) squares += x[d] * x[d];
    float scale = 1.0f / std::sqrt(squares / float(D) + eps);
#pragma omp simd
    for (int64_t d = 0; d < D; d++) put(out[d], x[d] * scale * weight[d]);
}

// This thread's share of `count` things, one behind the other.
inline std::pair<int64_t, int64_t> share(int64_t count) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {thread * count / threads, (thread + 1) * count / threads};
}

// What all threads read and write during a step: the residual stream, and activations on their way into products.
template <class T> struct Activations {
    Rows<T> normal, mixed, gated;
    int64_t width;  // of a row of qkv
    std::vector<float> stream, qkv;

    Activations(const Model &m, const Step &s)
        : normal(s.rows, m.hidden), mixed(s.rows, m.heads * m.head_dim), gated(s.rows, m.feed_forward),
          width(round_up((m.heads + 2 * m.kv_heads) * m.head_dim, LANES)), stream(s.rows * m.hidden),
          qkv(s.rows * width) {}
};

// One thread of a step. All threads call the same functions, each of which shares its loop among them.
template <class T, class W> struct Worker {
    const Model &m;
    const Step &s;
    Activations<T> &a;
    Tiles tiles;
    const int64_t room;  // of the sums of a block
    std::vector<float> out, work;
    std::vector<T> scratch;

    Worker(const Step &s, Activations<T> &a)
        : m(*s.model), s(s), a(a), tiles(sizeof(T) == 2), room(round_up(s.rows, TILE_ROWS) * LANES), out(GROUP * room),
          work(m.heads * (s.columns + round_up(m.head_dim, LANES))),
          scratch(std::is_same_v<T, W> ? 0 : GROUP * round_up(std::max({m.hidden, m.feed_forward, m.heads * m.head_dim}), 32) * LANES) {}

    // Shares blocks of outputs among threads. `use` gets a block's first output, how many it has, and its sums, rows of
    // 16.
    template <class M, class Use>
    void product(const Rows<T> &x, int64_t rows, const Matrix<M> &by, int64_t inputs, int64_t outputs, Use use) {
        const auto [begin, end] = share(blocks(outputs));
        for (int64_t n = begin; n < end; n += GROUP) {
            const int64_t count = std::min(GROUP, end - n);
            outputs_of(x, rows, by, inputs, n, count, scratch, out.data(), room);
            for (int64_t i = 0; i < count; i++)
                use((n + i) * LANES, std::min(LANES, outputs - (n + i) * LANES), &out[i * room]);
        }
#pragma omp barrier
    }

    void add_product(const Rows<T> &x, const PackedMatrix &by, int64_t inputs) {
        product(x, s.rows, matrix<W>(by), inputs, m.hidden, [&](int64_t first, int64_t count, const float *sums) {
            for (int64_t b = 0; b < s.rows; b++)
                for (int64_t j = 0; j < count; j++) a.stream[b * m.hidden + first + j] += sums[b * LANES + j];
        });
    }

    void embed() {
        const T *embedding = static_cast<const T *>(m.embedding);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s.rows; b++)
            for (int64_t d = 0; d < m.hidden; d++)
                a.stream[b * m.hidden + d] = get(embedding[s.tokens[b] * m.hidden + d]);
    }

    void norm(const float *weight) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s.rows; b++)
            normalise(&a.stream[b * m.hidden], weight, m.hidden, m.eps, a.normal.row(b));
    }

    void attend(const LayerWeights &layer, T *keys, T *values) {
        const int64_t E = m.head_dim, K = m.kv_heads, slot = s.columns * K * E;
        auto copy = [&](int64_t first, int64_t count, const float *sums) {
            for (int64_t b = 0; b < s.rows; b++) std::copy_n(&sums[b * LANES], count, &a.qkv[b * a.width + first]);
        };
        product(a.normal, s.rows, matrix<W>(layer.qkv), m.hidden, (m.heads + 2 * K) * E, copy);
        auto append_row = [&](int64_t b, int64_t from, int64_t to) {
            const int64_t at = s.token_slots[b] * slot + s.positions[b] * K * E, angle = s.positions[b] * (E / 2);
            append(s, &a.qkv[b * a.width], from, to, m.cos + angle, m.sin + angle, keys + at, values + at);
        };
        if (!s.distinct_slots) {  // a row may look at what another appends
#pragma omp for schedule(static)
            for (int64_t b = 0; b < s.rows; b++) append_row(b, 0, K);
        }
        const auto look = attention<T>(E);
        const int64_t parts = s.rows >= SHARED_ROWS ? 1 : std::min(K, (SHARED_ROWS + s.rows - 1) / s.rows);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t b = 0; b < s.rows; b++)
            for (int64_t part = 0; part < parts; part++) {
                const int64_t from = part * K / parts, to = (part + 1) * K / parts, at = s.token_slots[b] * slot;
                if (s.distinct_slots) append_row(b, from, to);
                look(s, &a.qkv[b * a.width], from, to, s.positions[b], keys + at, values + at, work.data(),
                     a.mixed.row(b));
            }
        add_product(a.mixed, layer.output, m.heads * E);
    }

    void gate_block(int64_t n, const float *gates, const float *ups) {
        const int64_t count = std::min(LANES, m.feed_forward - n * LANES);
        for (int64_t b = 0; b < s.rows; b++) {
            const float *gate = gates + b * LANES, *up = ups + b * LANES;
            T *to = a.gated.row(b) + n * LANES;
#pragma omp simd
            for (int64_t j = 0; j < count; j++) put(to[j], gate[j] * up[j] / (1.0f + exponential(-gate[j])));
        }
    }

    void feed_forward(const LayerWeights &layer) {
        const Matrix<W> gate_up = matrix<W>(layer.gate_up);
        const auto [begin, end] = share(blocks(m.feed_forward));
        for (int64_t n = begin; n < end; n += GROUP / 2) {
            const int64_t pairs = std::min(GROUP / 2, end - n);
            outputs_of(a.normal, s.rows, gate_up, m.hidden, 2 * n, 2 * pairs, scratch, out.data(), room);
            for (int64_t i = 0; i < pairs; i++) gate_block(n + i, &out[2 * i * room], &out[(2 * i + 1) * room]);
        }
#pragma omp barrier
        add_product(a.gated, layer.down, m.feed_forward);
    }

    template <class H> void answer(const Matrix<H> &head) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.answers; i++)
            normalise(&a.stream[s.answer_rows[i] * m.hidden], m.last_norm, m.hidden, m.eps, a.normal.row(i));
        product(a.normal, s.answers, head, m.hidden, m.vocabulary, [&](int64_t first, int64_t count, const float *sums) {
            for (int64_t i = 0; i < s.answers; i++)
                std::copy_n(&sums[i * LANES], count, s.logits + i * m.vocabulary + first);
        });
    }
};

template <class T, class W, class H> void decode(const Step &s) {  // weights of the layers (W) and of the head (H)
    const Model &m = *s.model;
    Activations<T> activations(m, s);
    const int64_t side = s.slots * s.columns * m.kv_heads * m.head_dim;  // the keys, or the values, of a layer
#pragma omp parallel
    {
        Worker<T, W> worker(s, activations);
        worker.embed();
        for (int64_t l = 0; l < m.layers; l++) {
            T *keys = static_cast<T *>(s.cache) + 2 * l * side;
            worker.norm(m.weights[l].attention_norm);
            worker.attend(m.weights[l], keys, keys + side);
            worker.norm(m.weights[l].mlp_norm);
            worker.feed_forward(m.weights[l]);
        }
        worker.answer(matrix<H>(m.head));
    }
}

// [outputs, inputs] -> packed for products in pairs or not; `every` and `offset` interleave the blocks of several
// matrices
template <class W>
void pack(int64_t outputs, int64_t inputs, const W *matrix, int64_t every, int64_t offset, int64_t pair, W *packed) {
    const int64_t size = round_up(inputs, 32) * LANES;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < blocks(outputs); n++) {
        W *to = packed + (n * every + offset) * size;
        std::memset(to, 0, size * sizeof(W));
        for (int64_t j = 0; j < std::min(LANES, outputs - n * LANES); j++)
            for (int64_t k = 0; k < inputs; k++)
                to[(k / pair * LANES + j) * pair + k % pair] = matrix[(n * LANES + j) * inputs + k];
    }
}

}  // namespace

#define PACK(NAME, W, PAIR)                                                                                            \
    void pack_##NAME(int64_t outputs, int64_t inputs, const W *matrix, int64_t every, int64_t offset, W *packed) {     \
        pack(outputs, inputs, matrix, every, offset, PAIR, packed);                                                    \
    }

extern "C" {
PACK(fp32, float, 1)
PACK(bf16, bf16, 2)
PACK(int8, int8_t, 2)

void decode_fp32(const Step *step) { decode<float, float, float>(*step); }
void decode_bf16(const Step *step) { decode<bf16, bf16, bf16>(*step); }
void decode_int8(const Step *step) { decode<bf16, int8_t, int8_t>(*step); }
void decode_int4(const Step *step) { decode<bf16, Nibbles, bf16>(*step); }

int64_t size_of_Model() { return sizeof(Model); }
int64_t size_of_Step() { return sizeof(Step); }
int64_t size_of_LayerWeights() { return sizeof(LayerWeights); }
}
