// Products of a few rows with packed weights, on tiles (AMX), pairs of bf16 (AVX-512), or plain vectors.
#pragma once

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
        struct alignas(64) Setup {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        };
        static constexpr Setup setup;  // on the stack GCC 12 writes its first bytes alone
        _tile_loadconfig(&setup);
    }
    ~Tiles() {
        if (used) _tile_release();
    }
#else
    explicit Tiles(bool) {}
#endif
};

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

}  // namespace
