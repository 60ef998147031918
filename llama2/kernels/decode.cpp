// One step of a Llama on a CPU: a token of each row in, logits out, all layers in one call. Rows are sequences of which
// each gets its newest token, or the tokens of prompts.
//
// PyTorch spends most of such a step on starting operations and on weights in an order that suits large products. Here
// weights lie in the order in which they are read, and products run on tiles (AMX), on pairs of bf16 (AVX-512), or on
// plain vectors, whichever the processor has. decode.py packs the weights, says what is computed, and builds this file.
//
// Numbers are fp32 or bf16 (T) in memory, weights also integers (W) of 8 bits with a scale for each output or of 4
// bits with a scale for each 32 inputs; sums, norms, softmax and the residual stream are fp32. A row's result does not
// depend on the other rows of its step, to the last bit.
//
// Shapes: B rows, D hidden, F feed-forward, H query heads, K key heads, G = H / K, E head dimension, V vocabulary,
// S columns of the cache. A packed matrix is [outputs / 16][inputs / pair][16][pair], zeros where sizes do not divide.

#include "attention.h"

namespace {

constexpr int64_t SHARED_ROWS = 16;  // with fewer rows, the heads of a row are shared among threads

template <class W> struct Layer {
    const float *attention_norm, *mlp_norm;
    Matrix<W> qkv, output, gate_up, down;  // gate and up alternate block by block
};

template <class T> void normed(const float *x, const float *weight, int64_t D, float eps, T *out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; d++) squares += x[d] * x[d];
    float scale = 1.0f / std::sqrt(squares / float(D) + eps);
#pragma omp simd
    for (int64_t d = 0; d < D; d++) put(out[d], x[d] * scale * weight[d]);
}

template <class T, class W, class H>  // weights of the layers and of the head
void step(const Shape &s, const void *const *pointers, const int64_t *tokens, const int64_t *slots,
          const int64_t *positions, const float *cos, const float *sin, T *cache, const int64_t *answers, float *logits) {
    auto matrix = [&](int64_t i) {
        return Matrix<W>{static_cast<const W *>(pointers[i]), static_cast<const float *>(pointers[i + 1])};
    };
    auto vector = [&](int64_t i) { return static_cast<const float *>(pointers[i]); };
    const T *embedding = static_cast<const T *>(pointers[0]);
    const float *last_norm = vector(1);
    const Matrix<H> head{static_cast<const H *>(pointers[2]), static_cast<const float *>(pointers[3])};
    const int64_t P = (s.H + 2 * s.K) * s.E, slot = s.columns * s.K * s.E, half = s.E / 2;
    Rows<T> normal(s.B, s.D), mixed(s.B, s.H * s.E), gated(s.B, s.F);
    std::vector<float> stream(s.B * s.D), qkv(s.B * round_up(P, LANES));
    const int64_t wide = round_up(P, LANES);
    const auto look = attention<T>(s.E);
    const int64_t parts = s.B >= SHARED_ROWS ? 1 : std::min(s.K, (SHARED_ROWS + s.B - 1) / s.B);
#pragma omp parallel
    {
        Tiles tiles(sizeof(T) == 2);
        const int64_t padded = round_up(s.B, TILE_ROWS);
        std::vector<float> out(2 * padded * LANES), work(s.H * (s.columns + round_up(s.E, LANES)));
        std::vector<T> scratch(round_up(std::max({s.D, s.F, s.H * s.E}), 32) * LANES);
        // Blocks of outputs, shared among threads; `use` gets the block's first output and its rows of 16 sums.
        auto product = [&](const Rows<T> &x, int64_t rows, const auto &by, int64_t inputs, int64_t outputs, auto use) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < (outputs + LANES - 1) / LANES; n++) {
                outputs_of(x, rows, by, inputs, n, scratch, out.data());
                use(n * LANES, std::min(LANES, outputs - n * LANES));
            }
        };
        auto add = [&](int64_t first, int64_t count) {
            for (int64_t b = 0; b < s.B; b++)
                for (int64_t j = 0; j < count; j++) stream[b * s.D + first + j] += out[b * LANES + j];
        };
        auto norm = [&](const float *weight) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < s.B; b++) normed(&stream[b * s.D], weight, s.D, s.eps, normal.row(b));
        };
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s.B; b++)
            for (int64_t d = 0; d < s.D; d++) stream[b * s.D + d] = get(embedding[tokens[b] * s.D + d]);
        for (int64_t l = 0; l < s.layers; l++) {
            const int64_t own = 4 + 10 * l;
            Layer<W> layer{vector(own), vector(own + 1), matrix(own + 2), matrix(own + 4), matrix(own + 6),
                           matrix(own + 8)};
            T *keys = cache + 2 * l * s.slots * slot, *values = keys + s.slots * slot;
            norm(layer.attention_norm);
            product(normal, s.B, layer.qkv, s.D, P, [&](int64_t first, int64_t count) {
                for (int64_t b = 0; b < s.B; b++) std::copy_n(&out[b * LANES], count, &qkv[b * wide + first]);
            });
            auto entered = [&](int64_t b, int64_t from, int64_t to) {
                const int64_t at = slots[b] * slot + positions[b] * s.K * s.E, turn = positions[b] * half;
                enter(s, &qkv[b * wide], from, to, cos + turn, sin + turn, keys + at, values + at);
            };
            if (!s.apart) {
#pragma omp for schedule(static)
                for (int64_t b = 0; b < s.B; b++) entered(b, 0, s.K);
            }
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t b = 0; b < s.B; b++)
                for (int64_t part = 0; part < parts; part++) {
                    const int64_t from = part * s.K / parts, to = (part + 1) * s.K / parts;
                    if (s.apart) entered(b, from, to);
                    look(s, &qkv[b * wide], from, to, positions[b], keys + slots[b] * slot, values + slots[b] * slot,
                         work.data(), mixed.row(b));
                }
            product(mixed, s.B, layer.output, s.H * s.E, s.D, add);
            norm(layer.mlp_norm);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < (s.F + LANES - 1) / LANES; n++) {
                float *gate = out.data(), *up = gate + padded * LANES;
                outputs_of(normal, s.B, layer.gate_up, s.D, 2 * n, scratch, gate);
                outputs_of(normal, s.B, layer.gate_up, s.D, 2 * n + 1, scratch, up);
                int64_t count = std::min(LANES, s.F - n * LANES);
                for (int64_t b = 0; b < s.B; b++) {
                    const float *a = gate + b * LANES, *u = up + b * LANES;
                    T *to = gated.row(b) + n * LANES;
#pragma omp simd
                    for (int64_t j = 0; j < count; j++) put(to[j], a[j] * u[j] / (1.0f + exponential(-a[j])));
                }
            }
            product(gated, s.B, layer.down, s.F, s.D, add);
        }
#pragma omp for schedule(static)
        for (int64_t a = 0; a < s.answers; a++)
            normed(&stream[answers[a] * s.D], last_norm, s.D, s.eps, normal.row(a));
        product(normal, s.answers, head, s.D, s.V, [&](int64_t first, int64_t count) {
            for (int64_t a = 0; a < s.answers; a++) std::copy_n(&out[a * LANES], count, logits + a * s.V + first);
        });
    }
}

// [outputs, inputs] -> packed for products in pairs or not; `every` and `offset` interleave the blocks of several matrices
template <class W>
void pack(int64_t outputs, int64_t inputs, const W *matrix, int64_t every, int64_t offset, int64_t pair, W *packed) {
    const int64_t size = round_up(inputs, 32) * LANES;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < (outputs + LANES - 1) / LANES; n++) {
        W *to = packed + (n * every + offset) * size;
        std::memset(to, 0, size * sizeof(W));
        for (int64_t j = 0; j < std::min(LANES, outputs - n * LANES); j++)
            for (int64_t k = 0; k < inputs; k++)
                to[(k / pair * LANES + j) * pair + k % pair] = matrix[(n * LANES + j) * inputs + k];
    }
}

}  // namespace

#define PACK(NAME, W, PAIR)                                                                                             \
    void pack_##NAME(int64_t outputs, int64_t inputs, const W *matrix, int64_t every, int64_t offset, W *packed) {     \
        pack(outputs, inputs, matrix, every, offset, PAIR, packed);                                                    \
    }

#define DECODE(NAME, T, W, H)                                                                                          \
    void decode_##NAME(const int64_t *n, float eps, const void *const *pointers, const int64_t *tokens,                \
                       const int64_t *slots, const int64_t *positions, const float *cos, const float *sin, T *cache,   \
                       const int64_t *answers, float *logits) {                                                        \
        step<T, W, H>(Shape{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], eps}, pointers,  \
                      tokens, slots, positions, cos, sin, cache, answers, logits);                                     \
    }

extern "C" {
PACK(f, float, 1)
PACK(b, bf16, 2)
PACK(i, int8_t, 2)
DECODE(f, float, float, float)
DECODE(b, bf16, bf16, bf16)
DECODE(i, bf16, int8_t, int8_t)
DECODE(n, bf16, Nibbles, bf16)
}
