// Attention of one row to the cache: 16 numbers at a time, written out, because compilers make little of loops as short
// as a head.
#pragma once

#include "products.h"
#include "step.h"

namespace {

constexpr int64_t AHEAD = 8;  // columns of the cache asked of memory before they are read

inline void rotate(float *x, int64_t E, const float *cos, const float *sin) {
    for (int64_t e = 0; e < E / 2; e++) {
        float a = x[e], b = x[e + E / 2];
        x[e] = a * cos[e] - b * sin[e];
        x[e + E / 2] = b * cos[e] + a * sin[e];
    }
}

// Rotates the queries and keys of one row to its position, and puts keys and values of heads `from` to `to` into the
// cache.
template <class T>
void append(const Step &s, float *qkv, int64_t from, int64_t to, const float *cos, const float *sin, T *keys,
            T *values) {
    const Model &m = *s.model;
    const int64_t E = m.head_dim, G = m.heads / m.kv_heads;
    for (int64_t h = from * G; h < to * G; h++) rotate(qkv + h * E, E, cos, sin);
    for (int64_t k = from; k < to; k++) {
        float *key = qkv + (m.heads + k) * E, *value = qkv + (m.heads + m.kv_heads + k) * E;
        rotate(key, E, cos, sin);
        for (int64_t e = 0; e < E; e++) put(keys[k * E + e], key[e]), put(values[k * E + e], value[e]);
    }
}

using Lanes = float __attribute__((vector_size(64)));

inline Lanes load(const float *from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Lanes load(const bf16 *from) {
    uint16_t __attribute__((vector_size(32))) bits;
    std::memcpy(&bits, from, sizeof bits);
    using Wide = uint32_t __attribute__((vector_size(64)));
    return std::bit_cast<Lanes>(__builtin_convertvector(bits, Wide) << 16);
}

template <class T> Lanes load(const T *from, int64_t count) {  // fewer than 16, then zeros
    T whole[LANES] = {};
    std::copy_n(from, count, whole);
    return load(whole);
}

inline float total(Lanes x) {
    auto low = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
    auto a = low + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    auto b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[1]) + (b[2] + b[3]);
}

// The head dimension as vectors: N of them, or as many as it takes (N = 0), of which the last may be short.
template <int N> struct Head {
    int64_t E, count;
    explicit Head(int64_t E) : E(E), count(N ? N : (E + LANES - 1) / LANES) {}

    template <class T> Lanes at(const T *from, int64_t i) const {
        if constexpr (N > 0) return load(from + i * LANES);
        return (i + 1) * LANES <= E ? load(from + i * LANES) : load(from + i * LANES, E - i * LANES);
    }
    template <class T> float dot(const float *q, const T *key) const {
        Lanes sum = at(q, 0) * at(key, 0);
        for (int64_t i = 1; i < count; i++) sum += at(q, i) * at(key, i);
        return total(sum);
    }
};

// Memory is asked for what will be read AHEAD columns later, even behind the last: asking does no harm.
template <class T> void fetch(const T *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

// The queries of one row and key heads `from` to `to` look at columns 0..position. All heads of a column lie together,
// so columns are gone through in the order of memory. `work` holds a row of scores for each head, then its sums.
template <int N, class T>
void attend(const Step &s, const float *queries, int64_t from, int64_t to, int64_t position, const T *keys,
            const T *values, float *work, T *out) {
    const Model &m = *s.model;
    const Head<N> head(m.head_dim);
    const int64_t E = m.head_dim, G = m.heads / m.kv_heads, step = m.kv_heads * E;
    const int64_t heads = (to - from) * G, first = from * G;
    const int64_t room = head.count * LANES;
    const float scale = 1.0f / std::sqrt(float(E));
    float *sums = work + heads * s.columns;
    for (int64_t t = 0; t <= position; t++) {
        fetch(keys + (t + AHEAD) * step + from * E, (to - from) * E);
        for (int64_t k = from, h = 0; k < to; k++)
            for (int64_t g = 0; g < G; g++, h++)
                work[h * s.columns + t] = scale * head.dot(queries + (first + h) * E, keys + t * step + k * E);
    }
    for (int64_t h = 0; h < heads; h++) {
        float *score = work + h * s.columns, top = -INFINITY, all = 0;
#pragma omp simd reduction(max : top)
        for (int64_t t = 0; t <= position; t++) top = std::max(top, score[t]);
#pragma omp simd reduction(+ : all)
        for (int64_t t = 0; t <= position; t++) all += score[t] = exponential(score[t] - top);
        const float share = 1.0f / all;
#pragma omp simd
        for (int64_t t = 0; t <= position; t++) score[t] *= share;
    }
    std::fill_n(sums, heads * room, 0.0f);
    for (int64_t t = 0; t <= position; t += 4) {
        const int64_t several = std::min<int64_t>(4, position + 1 - t);
        for (int64_t j = 0; j < 4; j++) fetch(values + (t + j + AHEAD) * step + from * E, (to - from) * E);
        for (int64_t k = from, h = 0; k < to; k++)
            for (int64_t g = 0; g < G; g++, h++) {
                const float *w = work + h * s.columns + t;
                const T *value = values + t * step + k * E;
                for (int64_t i = 0; i < head.count; i++) {
                    Lanes sum = load(sums + h * room + i * LANES);
                    for (int64_t j = 0; j < several; j++) sum += w[j] * head.at(value + j * step, i);
                    std::memcpy(sums + h * room + i * LANES, &sum, sizeof sum);
                }
            }
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t e = 0; e < E; e++) put(out[(first + h) * E + e], sums[h * room + e]);
}

template <class T> auto attention(int64_t E) {  // for this size of heads
    switch (E) {
    case 32: return attend<2, T>;
    case 48: return attend<3, T>;
    case 64: return attend<4, T>;
    case 128: return attend<8, T>;
    default: return attend<0, T>;
    }
}

}  // namespace
