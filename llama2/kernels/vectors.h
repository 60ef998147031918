// Sixteen numbers at a time, written out: compilers make little of loops as short as a head or a block of outputs.
#pragma once

#include "numbers.h"

namespace {

constexpr int64_t LANES = 16;  // numbers of a vector

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

inline void store(float *to, Lanes x) { std::memcpy(to, &x, sizeof x); }

inline float largest(const float *x, int64_t count) {  // compilers do not vectorise a maximum
    Lanes most = Lanes{} - INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Lanes next = load(x + i);
        most = next > most ? next : most;
    }
    float top = -INFINITY;
    for (int64_t j = 0; j < LANES; j++) top = std::max(top, most[j]);
    for (; i < count; i++) top = std::max(top, x[i]);
    return top;
}

// The sums of 16 vectors, pairwise: halves, quarters, neighbours.
inline Lanes totals(const Lanes *x) {
    Lanes eight[8], four[4], two[2];
    for (int i = 0; i < 8; i++) {
        const Lanes a = x[2 * i], b = x[2 * i + 1];
        eight[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 4; i++) {
        const Lanes a = eight[2 * i], b = eight[2 * i + 1];
        four[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    auto halve = [](Lanes a, Lanes b) {  // neighbours, in each quarter those of `a` before those of `b`
        return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
               __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
    };
    for (int i = 0; i < 2; i++) two[i] = halve(four[2 * i], four[2 * i + 1]);
    const Lanes all = halve(two[0], two[1]);
    return __builtin_shufflevector(all, all, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

}  // namespace
