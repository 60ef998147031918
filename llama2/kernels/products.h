// Products of a few rows with packed weights, on tiles (AMX), pairs of bf16 (AVX-512), or plain vectors.
#pragma once

#include "vectors.h"

#include <type_traits>

#ifdef __AVX512BF16__
#include <cpuid.h>
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILE_ROWS = 16;  // rows of an AMX tile; a block has LANES outputs

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Activations on their way into a product: rows padded to whole tiles, inputs to whole steps of 32, with zeros.
template <class T> struct Rows {
    int64_t width;
    std::vector<T> data;
    Rows(int64_t B, int64_t K) : width(round_up(K, 32)), data(round_up(B, TILE_ROWS) * width) {}
    T *row(int64_t b) { return data.data() + b * width; }
    const T *row(int64_t b) const { return data.data() + b * width; }
};

// ---- products: out[n][b][0..15] = sum over k of x[b][k] · w[n][k][0..15], for blocks n of a group and all rows b ----

constexpr int64_t GROUP = 4;  // blocks of outputs that share each reading of x

// Blocks of packed weights one behind the other, and where their sums go.
template <class T> struct Group {
    const Rows<T> &x;
    const T *w;
    int64_t size;  // of a block of weights
    float *out;
    int64_t room;  // of the sums of a block
};

#if defined(__AVX512F__)
constexpr int64_t WIDE_ROWS = 8, WIDE_BLOCKS = 2;  // as many sums as registers hold
#else
constexpr int64_t WIDE_ROWS = 4, WIDE_BLOCKS = 1;
#endif

// R rows and N blocks of fp32.
template <int R, int N> void singles(const Group<float> &g, int64_t first, int64_t n) {
    Lanes sum[R][N] = {};
    const float *x = g.x.row(first), *w = g.w + n * g.size;
    for (int64_t k = 0; k < g.x.width; k++)
        for (int i = 0; i < N; i++) {
            const Lanes weights = load(w + i * g.size + k * LANES);
            for (int r = 0; r < R; r++) sum[r][i] += x[r * g.x.width + k] * weights;
        }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) store(g.out + (n + i) * g.room + (first + r) * LANES, sum[r][i]);
}

#ifndef __AMX_BF16__
// R rows, given in fp32, and N blocks of bf16: a word of weights holds the even input below and the odd one above.
template <int R, int N> void halves(const Group<bf16> &g, const float *x, int64_t first, int64_t n) {
    using Words = uint32_t __attribute__((vector_size(64)));
    Lanes sum[R][N] = {};
    const bf16 *w = g.w + n * g.size;
    for (int64_t k = 0; k < g.x.width; k += 2)
        for (int i = 0; i < N; i++) {
            Words words;
            std::memcpy(&words, w + i * g.size + k * LANES, sizeof words);
            const Lanes even = std::bit_cast<Lanes>(words << 16), odd = std::bit_cast<Lanes>(words & 0xffff0000u);
            for (int r = 0; r < R; r++) {
                sum[r][i] += x[(first + r) * g.x.width + k] * even;
                sum[r][i] += x[(first + r) * g.x.width + k + 1] * odd;
            }
        }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) store(g.out + (n + i) * g.room + (first + r) * LANES, sum[r][i]);
}
#endif

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
// R rows and N blocks of bf16, inputs in pairs.
template <int R, int N> void pairs(const Group<bf16> &g, int64_t first, int64_t n) {
    __m512 sum[R][N];
    for (auto &row : sum)
        for (auto &each : row) each = _mm512_setzero_ps();
    const bf16 *x = g.x.row(first), *w = g.w + n * g.size;
    for (int64_t k = 0; k < g.x.width; k += 2) {
        __m512bh weights[N];
        for (int i = 0; i < N; i++) weights[i] = (__m512bh)_mm512_loadu_si512(w + i * g.size + k * LANES);
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, x + r * g.x.width + k, 4);
            for (int i = 0; i < N; i++)
                sum[r][i] = _mm512_dpbf16_ps(sum[r][i], weights[i], (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) _mm512_storeu_ps(g.out + (n + i) * g.room + (first + r) * LANES, sum[r][i]);
}
#endif

#ifdef __AMX_BF16__
// R tiles of rows and N blocks, R · N of them at most 4: what is loaded serves several products, none of which waits
// for another.
template <int R, int N> void tiles(const Group<bf16> &g, int64_t first, int64_t n) {
    const int64_t width = g.x.width, next = TILE_ROWS * width, size = g.size;
    const bf16 *x = g.x.row(first), *w = g.w + n * size;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < width; k += 32, x += 32, w += 32 * LANES) {
        _tile_loadd(4, x, width * 2);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (R == 2) {
            _tile_loadd(5, x + next, width * 2);
            _tile_dpbf16ps(1, 5, 6);
            if constexpr (N > 1) {
                _tile_loadd(7, w + size, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        } else {
            if constexpr (N > 1) {
                _tile_loadd(7, w + size, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if constexpr (N > 2) {
                _tile_loadd(5, w + 2 * size, 64);
                _tile_dpbf16ps(2, 4, 5);
            }
            if constexpr (N > 3) {
                _tile_loadd(6, w + 3 * size, 64);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
    }
    float *to = g.out + n * g.room + first * LANES;
    const int64_t rows = TILE_ROWS * LANES;
    _tile_stored(0, to, LANES * 4);
    if constexpr (R == 2) {
        _tile_stored(1, to + rows, LANES * 4);
        if constexpr (N > 1) {
            _tile_stored(2, to + g.room, LANES * 4);
            _tile_stored(3, to + g.room + rows, LANES * 4);
        }
    } else {
        if constexpr (N > 1) _tile_stored(1, to + g.room, LANES * 4);
        if constexpr (N > 2) _tile_stored(2, to + 2 * g.room, LANES * 4);
        if constexpr (N > 3) _tile_stored(3, to + 3 * g.room, LANES * 4);
    }
}
#endif

// Calls use(row, block, R, N) with constants R and N until B rows and `count` blocks are covered.
template <class Use> void cover(int64_t B, int64_t count, Use use) {
    using One = std::integral_constant<int, 1>;
    const std::integral_constant<int, WIDE_ROWS> rows;
    const std::integral_constant<int, WIDE_BLOCKS> blocks;
    for (int64_t n = 0; n < count; n += blocks()) {
        const bool whole = n + blocks() <= count;
        int64_t b = 0;
        for (; b + rows() <= B; b += rows()) whole ? use(b, n, rows, blocks) : use(b, n, rows, One());
        for (; b < B; b++) whole ? use(b, n, One(), blocks) : use(b, n, One(), One());
    }
}

inline void multiply(const Group<float> &g, int64_t B, int64_t count) {
    cover(B, count, [&](int64_t b, int64_t n, auto R, auto N) { singles<R(), N()>(g, b, n); });
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
inline bool is_intel() {
    unsigned leaf, name[3];
    return __get_cpuid(0, &leaf, &name[0], &name[1], &name[2]) && !std::memcmp(name, "Genu", 4);
}
#endif

#ifdef __AMX_BF16__
inline void multiply(const Group<bf16> &g, int64_t B, int64_t count) {
    if (B <= TILE_ROWS) {
        if (count == 4) return tiles<1, 4>(g, 0, 0);
        for (int64_t n = 0; n < count; n++) tiles<1, 1>(g, 0, n);
        return;
    }
    for (int64_t n = 0; n < count; n += 2)
        for (int64_t b = 0; b < B; b += 2 * TILE_ROWS) {
            const bool two = b + TILE_ROWS < B;
            if (n + 2 <= count)
                two ? tiles<2, 2>(g, b, n) : tiles<1, 2>(g, b, n);
            else
                two ? tiles<2, 1>(g, b, n) : tiles<1, 1>(g, b, n);
        }
}
#else
inline void multiply(const Group<bf16> &g, int64_t B, int64_t count) {
#ifdef __AVX512BF16__
    static const bool slow = is_intel();  // pairs take twice the time of the same products in fp32
    if (!slow) return cover(B, count, [&](int64_t b, int64_t n, auto R, auto N) { pairs<R(), N()>(g, b, n); });
#endif
    thread_local std::vector<float> x;
    x.resize(B * g.x.width);
    for (int64_t i = 0; i < B * g.x.width; i++) x[i] = get(g.x.data[i]);
    cover(B, count, [&](int64_t b, int64_t n, auto R, auto N) { halves<R(), N()>(g, x.data(), b, n); });
}
#endif

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

// `count` blocks of outputs from the `n`-th on, of any kind of weights; `scratch` holds them as T if they are integers.
template <class T, class W>
void outputs_of(const Rows<T> &x, int64_t B, const Matrix<W> &matrix, int64_t inputs, int64_t n, int64_t count,
                std::vector<T> &scratch, float *out, int64_t room) {
    const int64_t size = x.width * LANES;
    if constexpr (std::is_same_v<T, W>) {
        multiply(Group<T>{x, matrix.at(inputs, n), size, out, room}, B, count);
    } else {
        unpack(matrix.at(inputs, n), count * size, scratch.data());
        multiply(Group<T>{x, scratch.data(), size, out, room}, B, count);
        if constexpr (std::is_same_v<W, int8_t>)
            for (int64_t i = 0; i < count; i++)
                for (int64_t b = 0; b < B; b++)
#pragma omp simd
                    for (int64_t j = 0; j < LANES; j++)
                        out[i * room + b * LANES + j] *= matrix.scales[(n + i) * LANES + j];
    }
}

}  // namespace
