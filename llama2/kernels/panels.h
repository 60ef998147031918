// Small products of one block of 64 positions with another, on tiles (AMX) or plain vectors, and the orders in which
// their factors lie.
//
// A product C [M, N] = A [M, K] · B [K, N] reads A by rows. B lies by rows of numbers (fp32), or by rows of pairs from
// two rows (bf16 on tiles). Sums are fp32. M and N are whole multiples of 32, K of 32.
#pragma once

#include "products.h"

#include <array>

namespace {

constexpr int64_t SIDE = 64;  // positions of a block

// [rows, columns] -> [columns, rows] of words of 32 bits, both multiples of 16.
using Words = uint32_t __attribute__((vector_size(64)));

template <int STEP> inline void exchange(Words *x) {  // the off-diagonal parts of 2 STEP x 2 STEP words
    constexpr auto from = [](int half, int i) {
        if (i & STEP) return 16 + i - (half ? 0 : STEP);
        return i + (half ? STEP : 0);
    };
#define EACH(h) \
    from(h, 0), from(h, 1), from(h, 2), from(h, 3), from(h, 4), from(h, 5), from(h, 6), from(h, 7), from(h, 8), \
        from(h, 9), from(h, 10), from(h, 11), from(h, 12), from(h, 13), from(h, 14), from(h, 15)
    for (int i = 0; i < 16; i++)
        if (!(i & STEP)) {
            Words a = x[i], b = x[i + STEP];
            x[i] = __builtin_shufflevector(a, b, EACH(0));
            x[i + STEP] = __builtin_shufflevector(a, b, EACH(1));
        }
#undef EACH
}

inline void transpose(const void *from, int64_t rows, int64_t columns, void *to) {
    const uint32_t *in = static_cast<const uint32_t *>(from);
    uint32_t *out = static_cast<uint32_t *>(to);
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 16) {
            Words x[16];
            for (int i = 0; i < 16; i++) std::memcpy(&x[i], in + (r + i) * columns + c, 64);
            exchange<8>(x);
            exchange<4>(x);
            exchange<2>(x);
            exchange<1>(x);
            for (int i = 0; i < 16; i++) std::memcpy(out + (c + i) * rows + r, &x[i], 64);
        }
}

// ---- 16 numbers at a time ----

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }  // b where one is not a number

[[gnu::always_inline]] inline Lanes exponential(Lanes x) {  // see numbers.h
    using Integers = int32_t __attribute__((vector_size(64)));
    const Lanes lowest = Lanes{} - 80.0f;
    x = x < lowest ? lowest : x;
    Lanes shifted = x * 1.44269504f + 12582912.0f;
    Lanes whole = shifted - 12582912.0f;
    Lanes rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Lanes p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    return p * std::bit_cast<Lanes>((std::bit_cast<Integers>(shifted) << 23) + (127 << 23));
}

// ---- plain vectors: factors are fp32, by rows ----

struct Vectors {
    using Number = float;
    using Loose = float __attribute__((vector_size(64), aligned(4), may_alias));  // anywhere in memory

    // 16 numbers of a row, and of two neighbouring rows that a product goes through in pairs.
    static void put_row(Lanes x, float *row) { store(row, x); }

    static void put_pair(Lanes even, Lanes odd, float *rows, int64_t width) {
        store(rows, even);
        store(rows + width, odd);
    }

    // Where numbers of two neighbouring rows lie.
    static float *pair(float *matrix, int64_t row, int64_t column, int64_t width) {
        return matrix + row * width + column;
    }

    static void columns(const float *rows_SE, int64_t width, float *to) { transpose(rows_SE, SIDE, width, to); }

    static void turn(const float *pairs_SE, int64_t width, float *to) { transpose(pairs_SE, SIDE, width, to); }

    template <bool ADD>
    static void multiply(const float *a, const float *b, float *c, int64_t M, int64_t N, int64_t K) {
#ifdef __AVX512F__
        constexpr int R = 8, V = 2;  // sums fit into the registers
#else
        constexpr int R = 4, V = 1;
#endif
        for (int64_t n = 0; n < N; n += V * LANES)
            for (int64_t m = 0; m < M; m += R) {
                Loose *to[R];
                Lanes sum[R][V];
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    to[r] = reinterpret_cast<Loose *>(c + (m + r) * N + n);
#pragma GCC unroll 16
                    for (int v = 0; v < V; v++) sum[r][v] = ADD ? to[r][v] : Loose{};
                }
                for (int64_t k = 0; k < K; k++) {
                    const Loose *row = reinterpret_cast<const Loose *>(b + k * N + n);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
                        for (int v = 0; v < V; v++) sum[r][v] += a[(m + r) * K + k] * row[v];
                }
#pragma GCC unroll 16
                for (int r = 0; r < R; r++)
#pragma GCC unroll 16
                    for (int v = 0; v < V; v++) to[r][v] = sum[r][v];
            }
    }
};

// ---- tiles: factors are bf16 ----

#ifdef __AMX_BF16__
struct TilesOfPairs {
    using Number = bf16;

    static void put_row(Lanes x, bf16 *row) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(row), (__m256i)_mm512_cvtneps_pbh((__m512)x));
    }

    // Words of an even and an odd number.
    static void put_pair(Lanes even, Lanes odd, bf16 *words, int64_t) {
        alignas(64) static constexpr auto order = [] {
            std::array<uint16_t, 32> by_turns{};
            for (int i = 0; i < 32; i++) by_turns[i] = uint16_t(i / 2 + i % 2 * 16);
            return by_turns;
        }();
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        _mm512_storeu_si512(words, _mm512_permutexvar_epi16(_mm512_load_si512(order.data()), both));
    }

    static bf16 *pair(bf16 *matrix, int64_t row, int64_t column, int64_t width) {
        return matrix + row * width + 2 * column;
    }

    static void columns(const bf16 *rows_SE, int64_t width, bf16 *to) { transpose(rows_SE, SIDE, width / 2, to); }

    static void turn(const bf16 *pairs_SE, int64_t width, bf16 *to) { transpose(pairs_SE, SIDE / 2, width, to); }

    template <bool ADD>
    static void multiply(const bf16 *a, const bf16 *b, float *c, int64_t M, int64_t N, int64_t K) {
        for (int64_t m = 0; m < M; m += 32)
            for (int64_t n = 0; n < N; n += 32) {
                float *to = c + m * N + n;
                if constexpr (ADD) {
                    _tile_loadd(0, to, N * 4);
                    _tile_loadd(1, to + 16, N * 4);
                    _tile_loadd(2, to + 16 * N, N * 4);
                    _tile_loadd(3, to + 16 * N + 16, N * 4);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                for (int64_t k = 0; k < K; k += 32) {
                    _tile_loadd(4, a + m * K + k, K * 2);
                    _tile_loadd(5, a + (m + 16) * K + k, K * 2);
                    _tile_loadd(6, b + k * N + n * 2, N * 4);
                    _tile_loadd(7, b + k * N + n * 2 + 32, N * 4);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, to, N * 4);
                _tile_stored(1, to + 16, N * 4);
                _tile_stored(2, to + 16 * N, N * 4);
                _tile_stored(3, to + 16 * N + 16, N * 4);
            }
    }
};
#endif

template <class T> struct ChoosePanels { using Panels = Vectors; };
#ifdef __AMX_BF16__
template <> struct ChoosePanels<bf16> { using Panels = TilesOfPairs; };
#endif

// A block of `width` columns as a left side, and as a right side whose rows are summed over.
template <class Panels> void put_rows(const float *x, int64_t width, typename Panels::Number *to) {
    for (int64_t i = 0; i < SIDE * width; i += LANES) Panels::put_row(load(x + i), to + i);
}

template <class Panels> void put_pairs(const float *x, int64_t width, typename Panels::Number *to) {
    for (int64_t r = 0; r < SIDE; r += 2)
        for (int64_t c = 0; c < width; c += LANES)
            Panels::put_pair(load(x + r * width + c), load(x + (r + 1) * width + c), Panels::pair(to, r, c, width),
                             width);
}

}  // namespace
