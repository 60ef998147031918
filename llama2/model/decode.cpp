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

#include "numbers.h"

#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t LANES = 16;      // outputs of a block
constexpr int64_t TILE_ROWS = 16;  // rows of an AMX tile
constexpr int64_t AHEAD = 8;  // columns of the cache asked of memory before they are read
constexpr int64_t SHARED_ROWS = 16;  // with fewer rows, the heads of a row are shared among threads

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Activations on their way into a product: rows padded to whole tiles, inputs to whole steps of 32, with zeros.
template <class T> struct Rows {
    int64_t width;
    std::vector<T> data;
    Rows(int64_t B, int64_t K) : width(round_up(K, 32)), data(round_up(B, TILE_ROWS) * width) {}
    T *row(int64_t b) { return data.data() + b * width; }
    const T *row(int64_t b) const { return data.data() + b * width; }
};

// ---- products: out[b][0..15] = sum over k of x[b][k] · w[k][0..15], for all rows of one block of outputs ----

inline void block(const Rows<float> &x, int64_t B, const float *w, float *out) {
    for (int64_t first = 0; first < B; first += 8) {
        float sum[8][LANES] = {};
        int64_t rows = std::min<int64_t>(8, B - first);
        for (int64_t k = 0; k < x.width; k++)
            for (int64_t r = 0; r < rows; r++) {
                float value = x.row(first + r)[k];
#pragma omp simd
                for (int64_t j = 0; j < LANES; j++) sum[r][j] += value * w[k * LANES + j];
            }
        std::memcpy(out + first * LANES, sum, rows * sizeof sum[0]);
    }
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <int R> inline void pairs(const Rows<bf16> &x, int64_t first, const bf16 *w, float *out) {
    __m512 sum[R];
    for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < x.width; k += 2) {
        __m512bh weights = (__m512bh)_mm512_loadu_si512(w + k * LANES);
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, x.row(first + r) + k, 4);
            sum[r] = _mm512_dpbf16_ps(sum[r], weights, (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + (first + r) * LANES, sum[r]);
}
#endif

#ifdef __AMX_BF16__
// R tiles of rows share each tile of weights.
template <int R> inline void tiles(const Rows<bf16> &x, int64_t first, const bf16 *w, float *out) {
    const bf16 *from = x.row(first);
    const int64_t next = TILE_ROWS * x.width;
    _tile_zero(0);
    if constexpr (R > 1) _tile_zero(1);
    if constexpr (R > 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < x.width; k += 32) {
        _tile_loadd(4, w + k * LANES, 64);
        _tile_loadd(5, from + k, x.width * 2);
        _tile_dpbf16ps(0, 5, 4);
        if constexpr (R > 1) {
            _tile_loadd(6, from + next + k, x.width * 2);
            _tile_dpbf16ps(1, 6, 4);
        }
        if constexpr (R > 2) {
            _tile_loadd(5, from + 2 * next + k, x.width * 2);
            _tile_dpbf16ps(2, 5, 4);
            _tile_loadd(6, from + 3 * next + k, x.width * 2);
            _tile_dpbf16ps(3, 6, 4);
        }
    }
    float *to = out + first * LANES;
    _tile_stored(0, to, LANES * 4);
    if constexpr (R > 1) _tile_stored(1, to + TILE_ROWS * LANES, LANES * 4);
    if constexpr (R > 2) {
        _tile_stored(2, to + 2 * TILE_ROWS * LANES, LANES * 4);
        _tile_stored(3, to + 3 * TILE_ROWS * LANES, LANES * 4);
    }
}
#endif

inline void block(const Rows<bf16> &x, int64_t B, const bf16 *w, float *out) {
#if defined(__AMX_BF16__)
    int64_t first = 0;
    for (; first + 3 * TILE_ROWS < B; first += 4 * TILE_ROWS) tiles<4>(x, first, w, out);
    for (; first + TILE_ROWS < B; first += 2 * TILE_ROWS) tiles<2>(x, first, w, out);
    if (first < B) tiles<1>(x, first, w, out);
#elif defined(__AVX512BF16__)
    int64_t b = 0;
    for (; b + 4 <= B; b += 4) pairs<4>(x, b, w, out);
    for (; b < B; b++) pairs<1>(x, b, w, out);
#else
    for (int64_t b = 0; b < B; b++) {
        float sum[LANES] = {};
        for (int64_t k = 0; k < x.width; k += 2) {
            float even = get(x.row(b)[k]), odd = get(x.row(b)[k + 1]);
#pragma omp simd
            for (int64_t j = 0; j < LANES; j++)
                sum[j] += even * get(w[k * LANES + 2 * j]) + odd * get(w[k * LANES + 2 * j + 1]);
        }
        std::memcpy(out + b * LANES, sum, sizeof sum);
    }
#endif
}

// Tiles have to be asked for once a process and set up once a thread.
struct Tiles {
#ifdef __AMX_BF16__
    bool used;
    explicit Tiles(bool wanted) : used(wanted) {
        if (!used) return;
        static const long asked = syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, XTILEDATA
        (void)asked;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16};
        } setup;
        _tile_loadconfig(&setup);
    }
    ~Tiles() {
        if (used) _tile_release();
    }
#else
    explicit Tiles(bool) {}
#endif
};

// ---- the network ----

// 32 inputs of a block in 4 bits: a weight is (integer - zero) · scale. A byte holds a pair, the even input in its low
// half.
struct Nibbles {
    bf16 scales[LANES];
    uint8_t zeros[LANES];
    uint8_t pairs[16][LANES];
};
static_assert(sizeof(Nibbles) == 304);

template <class W> constexpr int64_t WEIGHTS = 1;  // in one W
template <> constexpr int64_t WEIGHTS<Nibbles> = 32 * LANES;

template <class W> struct Matrix {
    const W *packed;
    const float *scales;  // of each output, for integers of 8 bits

    const W *at(int64_t inputs, int64_t block) const {
        return packed + block * round_up(inputs, 32) * LANES / WEIGHTS<W>;
    }
};

#ifdef __AVX512BF16__
inline __m128i load16(const void *at) { return _mm_loadu_si128(static_cast<const __m128i *>(at)); }
#endif

inline void unpack(const int8_t *from, int64_t count, bf16 *to) {  // bf16 holds them exactly: nothing is rounded
#ifdef __AVX512BF16__
    auto floats = [](const int8_t *at) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(at))); };
    for (int64_t i = 0; i < count; i += 2 * LANES)
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(floats(from + i + LANES), floats(from + i)));
#else
#pragma omp simd
    for (int64_t i = 0; i < count; i++) to[i].bits = uint16_t(std::bit_cast<uint32_t>(float(from[i])) >> 16);
#endif
}

inline void unpack(const Nibbles *from, int64_t count, bf16 *to) {
#ifdef __AVX512BF16__  // compilers find a quarter of this speed
    alignas(64) uint16_t order[2 * LANES];
    for (int64_t i = 0; i < 2 * LANES; i++) order[i] = uint16_t(i / 2 + i % 2 * LANES);
    const __m512i by_turns = _mm512_load_si512(order), low = _mm512_set1_epi32(15);
    auto bytes = [](const uint8_t *at) { return _mm512_cvtepu8_epi32(load16(at)); };
    for (; count > 0; count -= WEIGHTS<Nibbles>, from++) {
        const __m512i halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from->scales));
        const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
        const __m512i zero = bytes(from->zeros);
        auto weights = [&](__m512i x) { return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(x, zero)), scale); };
        for (int64_t pair = 0; pair < 16; pair++, to += 2 * LANES) {
            const __m512i both = bytes(from->pairs[pair]);
            const __m512 even = weights(_mm512_and_si512(both, low)), odd = weights(_mm512_srli_epi32(both, 4));
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(by_turns, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
        }
    }
#else
    for (; count > 0; count -= WEIGHTS<Nibbles>, from++)
        for (int64_t pair = 0; pair < 16; pair++, to += 2 * LANES)
            for (int64_t j = 0; j < LANES; j++) {
                int32_t both = from->pairs[pair][j], zero = from->zeros[j];
                put(to[2 * j], float((both & 15) - zero) * get(from->scales[j]));
                put(to[2 * j + 1], float((both >> 4) - zero) * get(from->scales[j]));
            }
#endif
}

template <class W> struct Layer {
    const float *attention_norm, *mlp_norm;
    Matrix<W> qkv, output, gate_up, down;  // gate and up alternate block by block
};

// A block of outputs of any kind of weights; `scratch` holds them as T if they are integers.
template <class T, class W>
void outputs_of(const Rows<T> &x, int64_t B, const Matrix<W> &matrix, int64_t inputs, int64_t n, std::vector<T> &scratch,
                float *out) {
    if constexpr (std::is_same_v<T, W>) {
        block(x, B, matrix.at(inputs, n), out);
    } else {
        T *to = scratch.data();
        unpack(matrix.at(inputs, n), x.width * LANES, to);
        block(x, B, to, out);
        if constexpr (std::is_same_v<W, int8_t>)
            for (int64_t b = 0; b < B; b++)
#pragma omp simd
                for (int64_t j = 0; j < LANES; j++) out[b * LANES + j] *= matrix.scales[n * LANES + j];
    }
}

struct Shape {
    int64_t layers, D, F, H, K, E, V, B, slots, columns;
    int64_t answers;  // rows whose logits are wanted
    int64_t apart;    // whether every row has a slot of its own
    float eps;
};

template <class T> void normed(const float *x, const float *weight, int64_t D, float eps, T *out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; d++) squares += x[d] * x[d];
    float scale = 1.0f / std::sqrt(squares / float(D) + eps);
#pragma omp simd
    for (int64_t d = 0; d < D; d++) put(out[d], x[d] * scale * weight[d]);
}

inline void turn(float *x, int64_t E, const float *cos, const float *sin) {
    for (int64_t e = 0; e < E / 2; e++) {
        float a = x[e], b = x[e + E / 2];
        x[e] = a * cos[e] - b * sin[e];
        x[e + E / 2] = b * cos[e] + a * sin[e];
    }
}

// Queries and keys of one row turn to their position; keys and values of heads `from` to `to` go into the cache.
template <class T>
void enter(const Shape &s, float *qkv, int64_t from, int64_t to, const float *cos, const float *sin, T *keys, T *values) {
    const int64_t G = s.H / s.K, E = s.E;
    for (int64_t h = from * G; h < to * G; h++) turn(qkv + h * E, E, cos, sin);
    for (int64_t k = from; k < to; k++) {
        float *key = qkv + (s.H + k) * E, *value = qkv + (s.H + s.K + k) * E;
        turn(key, E, cos, sin);
        for (int64_t e = 0; e < E; e++) put(keys[k * E + e], key[e]), put(values[k * E + e], value[e]);
    }
}

// ---- attention: 16 numbers at a time, written out, for compilers make little of loops as short as a head ----

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
    auto a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
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
void attend(const Shape &s, const float *queries, int64_t from, int64_t to, int64_t position, const T *keys,
            const T *values, float *work, T *out) {
    const Head<N> head(s.E);
    const int64_t G = s.H / s.K, E = s.E, step = s.K * E, heads = (to - from) * G, first = from * G;
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

template <class T> auto attention(int64_t E) {
    return E == 32 ? attend<2, T> : E == 48 ? attend<3, T> : E == 64 ? attend<4, T> : E == 128 ? attend<8, T> : attend<0, T>;
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
