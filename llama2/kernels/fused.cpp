// What a Llama does between matrix products, on a CPU: one pass over memory forwards, one backwards.
//
// fused.py says what each function computes and builds this file when it is first needed. Numbers are fp32 or bf16 in
// memory and fp32 in between, and are rounded once. A row's result depends on that row alone, so that a batch and its
// parts agree to the last bit, and no sum depends on the number of threads.
//
// Shapes: N rows, D hidden, F feed-forward, B rows of T positions, H heads of E dimensions, V vocabulary.

#include "numbers.h"

// fused.py lays out the same fields in the same order, and `size_of` tells it whether it does.

struct Norm {
    int64_t rows, size;
    const void *x, *update;
    const float *weight;
    void *stream, *out;
    float *scale;  // [rows]: 1 / sqrt(mean(stream²) + eps)
    float eps;
};

struct NormGradient {
    int64_t rows, size;
    const void *grad, *grad_stream;  // what reaches the stream from beyond, if anything does
    const void *stream;
    const float *weight, *scale;
    void *grad_x, *grad_update;  // the same for both; the update has a copy where it has another precision
    float *grad_weight;
};

struct Heads {  // `heads` heads of positions `begin` to `end`, from the `first` on
    int64_t batch, length, stride, first, heads, head_dim, begin, end;  // `stride` numbers between rows of products
    const float *cos, *sin;  // [tables, length, head_dim], the sine negative in the first half; null: no rotation
    int64_t tables;          // batch, or 1 for all
    void *products, *split;
    float scale;
    int64_t join;  // the other way round, and rotated back
};

struct Softmax {  // of queries `begin` to `end` over the keys before `end`
    int64_t batch, length, heads, begin, end;
    const int64_t *starts;  // [batch, length], the first key that a query may see; null: the first of all
    const int64_t *gaps;    // [batch, length, 2], keys after that which it may not see, begin and end; null: none
    void *weights, *grad;   // [batch, heads, end - begin, end]; scores go in, and weights or their gradient come out
};

namespace {

constexpr float LOWEST = -3e38f;

constexpr int64_t LANES = 16;  // an explicit width, since compilers do not vectorise a maximum

template <class T> float largest(const T *row, int64_t n) {
    if (n < LANES) {
        float out = get(row[0]);
        for (int64_t i = 1; i < n; i++) out = get(row[i]) > out ? get(row[i]) : out;
        return out;
    }
    float lane[LANES];
    for (int64_t j = 0; j < LANES; j++) lane[j] = get(row[j]);
    for (int64_t i = LANES; i < n; i += LANES) {
        const T *some = row + (i + LANES <= n ? i : n - LANES);
#pragma omp simd
        for (int64_t j = 0; j < LANES; j++) lane[j] = get(some[j]) > lane[j] ? get(some[j]) : lane[j];
    }
    float out = lane[0];
    for (int64_t j = 1; j < LANES; j++) out = lane[j] > out ? lane[j] : out;
    return out;
}

// ---- RMSNorm ----

// stream = x + update, out = norm(stream); without an update the stream is x
template <class X, class O> void norm(const Norm &a) {
    const int64_t N = a.rows, D = a.size;
    const X *x = static_cast<const X *>(a.x);
    const O *update = static_cast<const O *>(a.update);
    X *stream = static_cast<X *>(a.stream);
    O *out = static_cast<O *>(a.out);
    const float *weight = a.weight, eps = a.eps;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const X *row = x + n * D;
        if (update) {
            X *sum = stream + n * D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) put(sum[d], get(row[d]) + get(update[n * D + d]));
            row = sum;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < D; d++) squares += get(row[d]) * get(row[d]);
        float s = 1.0f / std::sqrt(squares / float(D) + eps);
        a.scale[n] = s;
#pragma omp simd
        for (int64_t d = 0; d < D; d++) put(out[n * D + d], get(row[d]) * s * weight[d]);
    }
}

constexpr int64_t PARTS = 64;  // of all rows, summed apart, so that the number of threads changes nothing

template <class X, class O> void norm_back(const NormGradient &a) {
    const int64_t N = a.rows, D = a.size;
    const O *grad = static_cast<const O *>(a.grad);
    const X *grad_stream = static_cast<const X *>(a.grad_stream), *stream = static_cast<const X *>(a.stream);
    X *grad_x = static_cast<X *>(a.grad_x);
    O *grad_update = static_cast<O *>(a.grad_update);
    const float *weight = a.weight, *scale = a.scale;
    std::vector<float> parts(PARTS * D, 0.0f);
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < PARTS; part++) {
        float *sums = parts.data() + part * D;
        for (int64_t n = part * N / PARTS; n < (part + 1) * N / PARTS; n++) {
            const X *row = stream + n * D;
            const O *g = grad + n * D;
            X *to = grad_x + n * D;
            float s = scale[n], along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t d = 0; d < D; d++) {
                float product = get(g[d]) * get(row[d]) * s;
                sums[d] += product;
                along += product * weight[d];
            }
            along *= s / float(D);
            if (grad_stream) {
#pragma omp simd
                for (int64_t d = 0; d < D; d++)
                    put(to[d], get(grad_stream[n * D + d]) + (get(g[d]) * weight[d] - get(row[d]) * along) * s);
            } else {
#pragma omp simd
                for (int64_t d = 0; d < D; d++) put(to[d], (get(g[d]) * weight[d] - get(row[d]) * along) * s);
            }
            if (grad_update) {
#pragma omp simd
                for (int64_t d = 0; d < D; d++) put(grad_update[n * D + d], get(to[d]));
            }
        }
    }
    for (int64_t d = 0; d < D; d++) a.grad_weight[d] = 0;
    for (size_t i = 0; i < parts.size(); i++) a.grad_weight[i % D] += parts[i];
}

// ---- SwiGLU ----

// `stride` numbers from one row of gate and up to the next
template <class T> void swiglu(int64_t N, int64_t F, int64_t stride, const T *gates, const T *ups, T *out) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const T *gate = gates + n * stride, *up = ups + n * stride;
#pragma omp simd
        for (int64_t f = 0; f < F; f++)
            put(out[n * F + f], get(gate[f]) * get(up[f]) / (1.0f + exponential(-get(gate[f]))));
    }
}

template <class T> void swiglu_back(int64_t N, int64_t F, const T *grad, const T *y, T *grad_y) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const T *gate = y + n * 2 * F, *up = gate + F, *g = grad + n * F;
        T *grad_gate = grad_y + n * 2 * F, *grad_up = grad_gate + F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            float a = get(gate[f]), sigmoid = 1.0f / (1.0f + exponential(-a));
            put(grad_up[f], get(g[f]) * a * sigmoid);
            put(grad_gate[f], get(g[f]) * get(up[f]) * sigmoid * (1.0f + a * (1.0f - sigmoid)));
        }
    }
}

// ---- heads: between rows of a product and [B, H, end - begin, E] ----

// direction: 1 rotates by the angles of the tables, -1 back
template <class T>
void rotate(const T *from, T *to, int64_t E, const float *cos, const float *sin, float direction, float scale) {
    int64_t half = E / 2;
    if (!cos) {
#pragma omp simd
        for (int64_t e = 0; e < E; e++) put(to[e], get(from[e]) * scale);
        return;
    }
#pragma omp simd
    for (int64_t e = 0; e < half; e++) {
        float a = get(from[e]), b = get(from[e + half]);
        put(to[e], (a * cos[e] + direction * b * sin[e]) * scale);
        put(to[e + half], (b * cos[e + half] + direction * a * sin[e + half]) * scale);
    }
}

template <class T> void heads(const Heads &a) {
    const int64_t E = a.head_dim, H = a.heads, length = a.end - a.begin;
    T *rows = static_cast<T *>(a.products), *split = static_cast<T *>(a.split);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t b = 0; b < a.batch; b++)
        for (int64_t t = a.begin; t < a.end; t++) {
            int64_t angle = ((a.tables > 1 ? b * a.length : 0) + t) * E;
            const float *cos = a.cos ? a.cos + angle : nullptr, *sin = a.cos ? a.sin + angle : nullptr;
            for (int64_t h = 0; h < H; h++) {
                T *row = rows + (b * a.length + t) * a.stride + (a.first + h) * E;
                T *head = split + ((b * H + h) * length + t - a.begin) * E;
                if (a.join)
                    rotate(head, row, E, cos, sin, -1.0f, a.scale);
                else
                    rotate(row, head, E, cos, sin, 1.0f, a.scale);
            }
        }
}

// ---- softmax over the positions a query may see: from its document's first to its own ----

constexpr int64_t TILE = 8;  // rows taken through one phase after another: a row alone would wait for its sums

template <class T> void softmax(const Softmax &a) {
    const int64_t H = a.heads, begin = a.begin, end = a.end, length = end - begin;
    T *scores = static_cast<T *>(a.weights);
#pragma omp parallel
    {
        std::vector<float> work(TILE * end);
        float top[TILE], total[TILE];
        int64_t from[TILE], count[TILE];
#pragma omp for schedule(static) collapse(2)
        for (int64_t bh = 0; bh < a.batch * H; bh++)
            for (int64_t first = begin; first < end; first += TILE) {
                int64_t rows = std::min(TILE, end - first);
                T *tile = scores + (bh * length + first - begin) * end;
                for (int64_t r = 0; r < rows; r++) {
                    int64_t t = first + r;
                    from[r] = a.starts ? a.starts[bh / H * a.length + t] : 0;
                    int64_t n = t + 1 - from[r];
                    count[r] = std::min((n + LANES - 1) / LANES * LANES, end - from[r]);  // a loop's rest is slow
                    T *row = tile + r * end + from[r];
                    if (a.gaps) {
                        const int64_t *gap = a.gaps + 2 * (bh / H * a.length + t);
                        for (int64_t s = gap[0]; s < gap[1]; s++) put(tile[r * end + s], LOWEST);
                    }
                    for (int64_t s = n; s < count[r]; s++) put(row[s], LOWEST);
                    top[r] = largest(row, count[r]);
                }
                for (int64_t r = 0; r < rows; r++) {
                    const T *row = tile + r * end + from[r];
                    float sum = 0, *e = work.data() + r * end;
#pragma omp simd reduction(+ : sum)
                    for (int64_t s = 0; s < count[r]; s++) {
                        e[s] = exponential(get(row[s]) - top[r]);
                        sum += e[s];
                    }
                    total[r] = sum;
                }
                for (int64_t r = 0; r < rows; r++) {
                    T *all = tile + r * end, *row = all + from[r];
                    float scale = 1.0f / total[r], *e = work.data() + r * end;
#pragma omp simd
                    for (int64_t s = 0; s < count[r]; s++) put(row[s], e[s] * scale);
                    int64_t t = first + r;
                    std::memset(all, 0, from[r] * sizeof(T));
                    std::memset(all + t + 1, 0, (end - t - 1) * sizeof(T));
                }
            }
    }
}

template <class T> void softmax_back(const Softmax &a) {
    const int64_t H = a.heads, begin = a.begin, end = a.end, length = end - begin;
    const T *weights = static_cast<const T *>(a.weights);
    T *grad = static_cast<T *>(a.grad);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t bh = 0; bh < a.batch * H; bh++)
        for (int64_t t = begin; t < end; t++) {
            int64_t from = a.starts ? a.starts[bh / H * a.length + t] : 0, n = t + 1 - from;
            int64_t count = std::min((n + LANES - 1) / LANES * LANES, end - from);  // beyond n all weights are 0
            int64_t row = (bh * length + t - begin) * end;
            const T *p = weights + row + from;
            T *all = grad + row, *g = all + from;
            float along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t s = 0; s < count; s++) along += get(p[s]) * get(g[s]);
#pragma omp simd
            for (int64_t s = 0; s < count; s++) put(g[s], get(p[s]) * (get(g[s]) - along));
            std::memset(all, 0, from * sizeof(T));
            std::memset(g + n, 0, (end - t - 1) * sizeof(T));
        }
}

// ---- likelihood ----

// In: logits. Out: (softmax - onehot) · total in their place, log p(target), total = sum of exp(logit - largest), and
// the entropy where it is wanted.
template <class T>
void likelihood(int64_t N, int64_t V, T *logits, const int64_t *targets, float *logp, float *totals, float *entropy) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        T *row = logits + n * V;
        float top = largest(row, V), total = 0, mean = 0, target = get(row[targets[n]]) - top;
        if (entropy) {
#pragma omp simd reduction(+ : total, mean)
            for (int64_t v = 0; v < V; v++) {
                float shifted = get(row[v]) - top, e = exponential(shifted);
                total += e;
                mean += e * shifted;
                put(row[v], e);
            }
            entropy[n] = std::log(total) - mean / total;
        } else {
#pragma omp simd reduction(+ : total)
            for (int64_t v = 0; v < V; v++) {
                float e = exponential(get(row[v]) - top);
                total += e;
                put(row[v], e);
            }
        }
        logp[n] = target - std::log(total);
        totals[n] = total;
        put(row[targets[n]], std::expm1(logp[n]) * total);
    }
}

}  // namespace

#define EACH(NAME, T)                                                                                                  \
    void swiglu_##NAME(int64_t N, int64_t F, int64_t stride, const T *gate, const T *up, T *out) {                     \
        swiglu(N, F, stride, gate, up, out);                                                                           \
    }                                                                                                                  \
    void swiglu_back_##NAME(int64_t N, int64_t F, const T *grad, const T *y, T *grad_y) {                              \
        swiglu_back(N, F, grad, y, grad_y);                                                                            \
    }                                                                                                                  \
    void heads_##NAME(const Heads *a) { heads<T>(*a); }                                                                \
    void softmax_##NAME(const Softmax *a) { softmax<T>(*a); }                                                          \
    void softmax_back_##NAME(const Softmax *a) { softmax_back<T>(*a); }                                                \
    void likelihood_##NAME(int64_t N, int64_t V, T *logits, const int64_t *targets, float *logp, float *totals,        \
                           float *entropy) {                                                                           \
        likelihood(N, V, logits, targets, logp, totals, entropy);                                                      \
    }

#define PAIR(NAME, X, O)                                                                                               \
    void norm_##NAME(const Norm *a) { norm<X, O>(*a); }                                                                \
    void norm_back_##NAME(const NormGradient *a) { norm_back<X, O>(*a); }

extern "C" {
EACH(fp32, float)
EACH(bf16, bf16)
PAIR(fp32_fp32, float, float)
PAIR(fp32_bf16, float, bf16)
PAIR(bf16_bf16, bf16, bf16)

int64_t size_of_Norm() { return sizeof(Norm); }
int64_t size_of_NormGradient() { return sizeof(NormGradient); }
int64_t size_of_Heads() { return sizeof(Heads); }
int64_t size_of_Softmax() { return sizeof(Softmax); }
}
