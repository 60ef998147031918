// Attention of one row to the cache, a few heads and columns at a time.
#pragma once

#include "products.h"
#include "step.h"

namespace {

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

// The head dimension as vectors: N of them, or as many as it takes (N = 0), of which the last may be short.
template <int N> struct Head {
    int64_t E, count;
    explicit Head(int64_t E) : E(E), count(N ? N : (E + LANES - 1) / LANES) {}

    template <class T> Lanes at(const T *from, int64_t i) const {
        if constexpr (N > 0) return load(from + i * LANES);
        return (i + 1) * LANES <= E ? load(from + i * LANES) : load(from + i * LANES, E - i * LANES);
    }
};

constexpr int64_t AHEAD = 16;  // columns of the cache asked of memory before they are read

// Even behind the last column: asking does no harm.
template <class T> void fetch(const T *column, int64_t E) {
    for (int64_t e = 0; e < E; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(column + e);
}

// G query heads look at `count` columns, at most LANES, of their key head: scores[g][t], `room` apart.
template <int G, int N, class T>
void score(const Head<N> &head, const float *queries, const T *keys, int64_t step, int64_t count, float scale,
           float *scores, int64_t room) {
    Lanes products[G][LANES] = {};
    for (int64_t t = 0; t < count; t++) {
        fetch(keys + (t + AHEAD) * step, head.E);
        Lanes sum[G];
        for (int64_t i = 0; i < head.count; i++) {
            const Lanes key = head.at(keys + t * step, i);
            for (int g = 0; g < G; g++) {
                const Lanes query = head.at(queries + g * head.E, i);
                sum[g] = i ? sum[g] + query * key : query * key;
            }
        }
        for (int g = 0; g < G; g++) products[g][t] = sum[g];
    }
    for (int g = 0; g < G; g++) {
        const Lanes all = scale * totals(products[g]);
        std::memcpy(scores + g * room, &all, count * sizeof(float));
    }
}

// sums[g][e], in whole vectors, grow by the values of `count` columns times weights[g][t].
template <int G, int N, class T>
void mix(const Head<N> &head, const float *weights, int64_t room, const T *values, int64_t step, int64_t count,
         float *sums) {
    constexpr int M = N ? N : 1;
    for (int64_t first = 0; first < head.count; first += M) {
        Lanes sum[G][M];
        for (int g = 0; g < G; g++)
            for (int i = 0; i < M; i++) sum[g][i] = load(sums + (g * head.count + first + i) * LANES);
        for (int64_t t = 0; t < count; t++) {
            fetch(values + (t + AHEAD) * step, head.E);
            for (int i = 0; i < M; i++) {
                const Lanes value = head.at(values + t * step, first + i);
                for (int g = 0; g < G; g++) sum[g][i] += weights[g * room + t] * value;
            }
        }
        for (int g = 0; g < G; g++)
            for (int i = 0; i < M; i++) store(sums + (g * head.count + first + i) * LANES, sum[g][i]);
    }
}

// Calls use(first, size) for `count` heads in groups whose size is known to the compiler: each key is read for all of a
// group at once.
template <int N, class Use> void group_heads(int64_t count, Use use) {
    constexpr int MOST = N == 0 || N > 4 ? 1 : 4;  // what registers hold
    for (int64_t first = 0; first < count;) {
        const int64_t size = std::min<int64_t>(count - first, MOST);
        if constexpr (MOST == 4) {
            if (size == 4) use(first, std::integral_constant<int, 4>());
            if (size == 3) use(first, std::integral_constant<int, 3>());
            if (size == 2) use(first, std::integral_constant<int, 2>());
        }
        if (size == 1) use(first, std::integral_constant<int, 1>());
        first += size;
    }
}

// The queries of one row and key heads `from` to `to` look at columns 0..position. All heads of a column lie together,
// so columns are gone through in the order of memory. `work` holds a row of scores for each head, then its sums.
template <int N, class T>
void attend(const Step &s, const float *queries, int64_t from, int64_t to, int64_t position, const T *keys,
            const T *values, float *work, T *out) {
    const Model &m = *s.model;
    const Head<N> head(m.head_dim);
    const int64_t E = m.head_dim, G = m.heads / m.kv_heads, step = m.kv_heads * E;
    const int64_t heads = (to - from) * G, first = from * G, room = head.count * LANES;
    const float scale = 1.0f / std::sqrt(float(E));
    float *sums = work + heads * s.columns;
    for (int64_t t = 0; t <= position; t += LANES) {
        const int64_t count = std::min(LANES, position + 1 - t);
        for (int64_t k = from; k < to; k++) {
            const T *columns = keys + t * step + k * E;
            group_heads<N>(G, [&](int64_t g, auto size) {
                float *scores = work + ((k - from) * G + g) * s.columns + t;
                score<size()>(head, queries + (k * G + g) * E, columns, step, count, scale, scores, s.columns);
            });
        }
    }
    for (int64_t h = 0; h < heads; h++) {
        float *score = work + h * s.columns, all = 0;
        const float top = largest(score, position + 1);
#pragma omp simd reduction(+ : all)
        for (int64_t t = 0; t <= position; t++) all += score[t] = exponential(score[t] - top);
        const float share = 1.0f / all;
#pragma omp simd
        for (int64_t t = 0; t <= position; t++) score[t] *= share;
    }
    std::fill_n(sums, heads * room, 0.0f);
    for (int64_t t = 0; t <= position; t += LANES) {
        const int64_t count = std::min(LANES, position + 1 - t);
        for (int64_t k = from; k < to; k++) {
            const T *columns = values + t * step + k * E;
            group_heads<N>(G, [&](int64_t g, auto size) {
                const int64_t h = (k - from) * G + g;
                mix<size()>(head, work + h * s.columns + t, s.columns, columns, step, count, sums + h * room);
            });
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
