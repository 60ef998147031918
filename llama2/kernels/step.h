// What a decoding step reads. cpu_decoder.py lays out the same fields in the same order, and `size_of` tells it whether
// it does.
#pragma once

#include <cstdint>

struct PackedMatrix {
    const void *packed;
    const float *scales;  // of each output, for integers of 8 bits
};

struct LayerWeights {
    const float *attention_norm, *mlp_norm;
    PackedMatrix qkv, output, gate_up, down;  // gate and up alternate block by block
};

struct Model {
    int64_t layers, hidden, feed_forward, heads, kv_heads, head_dim, vocabulary;
    const void *embedding;
    const float *last_norm, *cos, *sin;  // tables [positions, head_dim / 2]
    const LayerWeights *weights;
    PackedMatrix head;
    float eps;
};

struct Step {
    const Model *model;

    // the tokens of this step: each is read in a slot, at a position
    int64_t rows;
    int64_t distinct_slots;  // whether every row has a slot of its own
    const int64_t *tokens, *token_slots, *positions;

    // keys and values [layers, 2, slots, columns, kv_heads, head_dim]
    int64_t slots, columns;
    void *cache;

    // the rows behind which logits are wanted
    int64_t answers;
    const int64_t *answer_rows;
    float *logits;  // [answers, vocabulary]
};
