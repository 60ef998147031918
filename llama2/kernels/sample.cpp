// The next token of each row on a CPU: its logits are gone through twice, where PyTorch's softmax, cumulative sum,
// search and log-sum-exp make a dozen passes. sampling.py says what is drawn, and builds this file.
//
// A row's result does not depend on the other rows, to the last bit. Shapes: B rows, V vocabulary.

#include "numbers.h"

struct Draw {  // sampling.py lays out the same fields in the same order, and `size_of` tells it whether it does
    int64_t rows, vocabulary;
    const float *logits, *changed;  // the model's own, and those that are drawn from
    const float *uniforms;
    float scale;  // 1 / temperature, or 0 for the likeliest token
    int64_t *tokens;
    float *logprobs;
    float *likelier;  // the share of the probability that likelier tokens have; wanted if the pointer is there
};

namespace {

constexpr int64_t BLOCK = 512;  // tokens whose weights are summed together; a search looks into one block only

// Sums of exp(scale · (x - top)) for each block, and of all.
double weigh(const float *x, int64_t V, float top, float scale, std::vector<double> &blocks) {
    double total = 0;
    for (int64_t first = 0; first < V; first += BLOCK) {
        float sum = 0;
        const int64_t end = std::min(V, first + BLOCK);
#pragma omp simd reduction(+ : sum)
        for (int64_t v = first; v < end; v++) sum += exponential(scale * (x[v] - top));
        total += blocks[first / BLOCK] = sum;
    }
    return total;
}

// The first token with which the weights reach `goal`.
int64_t search(const float *x, int64_t V, float top, float scale, const std::vector<double> &blocks, double goal) {
    int64_t block = 0, last = (V - 1) / BLOCK, found = -1;
    while (block < last && goal >= blocks[block]) goal -= blocks[block++];
    for (int64_t v = block * BLOCK; v < std::min(V, (block + 1) * BLOCK); v++) {
        float weight = exponential(scale * (x[v] - top));
        if (x[v] > -INFINITY && scale * (x[v] - top) > -80.0f) found = v;  // rounding must not end at an impossible token
        if ((goal -= weight) < 0 && found == v) break;
    }
    return found;
}

float largest(const float *x, int64_t V, int64_t *place) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < V; v++) top = std::max(top, x[v]);
    if (place) *place = std::find(x, x + V, top) - x;
    return top;
}

}  // namespace

extern "C" {

void draw(const Draw *a) {
    const int64_t V = a->vocabulary;
    const float scale = a->scale;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < a->rows; b++) {
        const float *own = a->logits + b * V, *x = a->changed + b * V;
        std::vector<double> blocks((V + BLOCK - 1) / BLOCK);
        int64_t token = 0;
        float top = largest(x, V, scale ? nullptr : &token);
        double total = scale || x == own ? weigh(x, V, top, scale ? scale : 1.0f, blocks) : 0;
        if (scale) {
            token = search(x, V, top, scale, blocks, a->uniforms[b] * total);
            if (token < 0) token = std::find(x, x + V, top) - x;
        }
        if (a->likelier) {
            float mass = 0;
#pragma omp simd reduction(+ : mass)
            for (int64_t v = 0; v < V; v++) mass += x[v] > x[token] ? exponential(scale * (x[v] - top)) : 0.0f;
            a->likelier[b] = float(mass / total);
        }
        if (x != own || (scale && scale != 1.0f)) {
            top = largest(own, V, nullptr);
            total = weigh(own, V, top, 1.0f, blocks);
        }
        token = std::min(token, V - 1);
        a->tokens[b] = token;
        a->logprobs[b] = own[token] - top - float(std::log(total));
    }
}

int64_t size_of_Draw() { return sizeof(Draw); }
}
