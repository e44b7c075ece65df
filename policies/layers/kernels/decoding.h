// One new token per sequence, here called a row, through all layers of a Llama.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention.h"
#include "lanes.h"
#include "products.h"
#include "tokens.h"

namespace {

// Attention of one query [wide] to keys and values [tokens, wide], where wide is a multiple of TILE. weights: scratch
// memory for `tokens` numbers, rounded up to a multiple of LANES.
template <typename T>
inline void attend(
    const float* query, const T* keys, const T* values, int64_t wide, const int64_t* mask, int64_t tokens,
    float* weights, float* out
) {
    for (int64_t first = 0; first < tokens; first += LANES) {
        Lanes dots[LANES];
        for (int i = 0; i < LANES; i++) {
            const T* key = keys + std::min(first + i, tokens - 1) * wide;
            Lanes dot{};
            for (int64_t d = 0; d < wide; d += LANES) dot += load(query + d) * load(key + d);
            dots[i] = dot;
        }
        store(weights + first, sums(dots));
    }
    for (int64_t t = 0; t < tokens; t++)
        if (!mask[t]) weights[t] = -INFINITY;
    softmax(weights, tokens, tokens);
    for (int64_t d = 0; d < wide; d += TILE)
        product<1, WIDE>(weights, 0, 1, values + d, wide, tokens, out + d, wide, false);
}

// Attention of one new token per row to the row's KV cache. All threads of a team call it together.
// query: [rows, heads, width], of stride `query_stride` between rows; keys, values: [rows, groups, tokens, width], of
// strides `row_stride` and `group_stride`; mask: [rows, tokens], 0 where a token is masked; out:
// [rows, heads, width].
template <typename X, typename T>
void attend_new_tokens(
    const X* query, int64_t query_stride, const T* keys, const T* values, int64_t row_stride, int64_t group_stride,
    const int64_t* mask, int64_t rows, int64_t heads, int64_t groups, int64_t width, int64_t tokens, float scale, X* out
) {
    const int64_t wide = round_up(width, TILE), padded = round_up(tokens, LANES);
    const int64_t copied = wide > width ? tokens * wide : 0;
    Scratch scratch(2 * wide + padded + 2 * copied);
    float *q = scratch(wide), *head_out = scratch(wide), *weights = scratch(padded);
    float *k = scratch(copied), *v = scratch(copied);
#pragma omp for collapse(2)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t offset = r * row_stride + h / (heads / groups) * group_stride;
            gather(query + r * query_stride + h * width, 0, 1, width, q, wide, 1, scale);
            if (copied) {
                gather(keys + offset, width, tokens, width, k, wide, tokens, 1.0f);
                gather(values + offset, width, tokens, width, v, wide, tokens, 1.0f);
                attend(q, k, v, wide, mask + r * tokens, tokens, weights, head_out);
            } else {
                attend(q, keys + offset, values + offset, wide, mask + r * tokens, tokens, weights, head_out);
            }
            scatter(head_out, wide, out + (r * heads + h) * width, 0, 1, width, 1.0f);
        }
}

// Dot products of R rows with LANES / R rows of a weight: out[r · LANES / R + n] = Σ_k x[r · inner + k] · weight[n][k].
template <int R, typename T>
inline void dots(const float* x, const T* const* weight, int64_t inner, float* out) {
    constexpr int N = LANES / R;
    Lanes totals[LANES] = {};
    const auto accumulate = [&](int64_t k, auto load_at) {
        Lanes weights[N];
        for (int n = 0; n < N; n++) weights[n] = load_at(weight[n], k);
        for (int r = 0; r < R; r++) {
            const Lanes activation = load_at(x + r * inner, k);
            for (int n = 0; n < N; n++) totals[r * N + n] += activation * weights[n];
        }
    };
    int64_t k = 0;
    for (; k + LANES <= inner; k += LANES) accumulate(k, [](const auto* from, int64_t i) { return load(from + i); });
    if (k < inner) accumulate(k, [&](const auto* from, int64_t i) { return load_part(from, i, inner); });
    store(out, sums(totals));
}

// Adds to `out`, R rows at a time from `row` on, their dot products with `outputs` rows of a weight. Returns the first
// row that remains.
template <int R, typename T>
inline int64_t add_dots(
    const float* x, const T* weight, float* out, int64_t row, int64_t rows, int64_t inner, int64_t outer,
    int64_t outputs
) {
    constexpr int N = LANES / R;
    for (; row + R <= rows; row += R)
        for (int64_t n = 0; n < outputs; n += N) {
            const T* weight_rows[N];
            for (int i = 0; i < N; i++) weight_rows[i] = weight + std::min(n + i, outputs - 1) * inner;
            float totals[LANES];
            dots<R>(x + row * inner, weight_rows, inner, totals);
            for (int r = 0; r < R; r++)
                for (int64_t i = 0; i < std::min<int64_t>(N, outputs - n); i++)
                    out[(row + r) * outer + n + i] += totals[r * N + i];
        }
    return row;
}

// out += x · weightᵀ for few rows. All threads of a team call it together. x: [rows, inner]; weight: [outer, inner];
// out: [rows, outer].
template <typename T>
void add_product(const float* x, const T* weight, float* out, int64_t rows, int64_t inner, int64_t outer) {
#pragma omp for
    for (int64_t n = 0; n < outer; n += LANES) {
        const T* weight_rows = weight + n * inner;
        const int64_t outputs = std::min<int64_t>(LANES, outer - n);
        int64_t row = add_dots<4>(x, weight_rows, out + n, 0, rows, inner, outer, outputs);
        row = add_dots<2>(x, weight_rows, out + n, row, rows, inner, outer, outputs);
        add_dots<1>(x, weight_rows, out + n, row, rows, inner, outer, outputs);
    }
}

// The weights [outputs, inputs] of a layer, stacked where they have the same input (q, k, v; gate, up), and its KV
// cache. qkv_bias, query_norm and key_norm are null in models without them. `addresses` in `decode_step.py` fills these
// fields.
template <typename T>
struct Layer {
    const T *input_norm, *qkv, *qkv_bias, *query_norm, *key_norm, *output, *post_attention_norm, *gate_up, *down;
    T *keys, *values;
};

// The layers of a Llama for one new token per row, the last of the `tokens` in its KV cache.
template <typename T>
struct DecoderStack {
    const Layer<T>* layers;
    int64_t count, rows, hidden, heads, groups, width, inner;
    const T *cosines, *sines;                  // [rows, width]
    int64_t row_stride, group_stride, tokens;  // strides of the KV cache, and its length S
    const int64_t* mask;                       // [rows, tokens], 0 where a token is masked
    float epsilon, scale;
    int64_t threads;

    // x: [rows, hidden], in place.
    void run(float* x) const {
        const int64_t rotated_heads = heads + groups, qkv_width = (rotated_heads + groups) * width;
        const int64_t widest = std::max(std::max(hidden, heads * width), inner);
        Scratch scratch(rows * (2 * widest + std::max(qkv_width, 2 * inner) + rotated_heads * width) + 4 * LANES);
        float *normed = scratch(rows * widest), *branch = scratch(rows * widest);
        float* states = scratch(rows * std::max(qkv_width, 2 * inner));
        float* rotated = scratch(rows * rotated_heads * width);
#pragma omp parallel num_threads(threads)
        for (const Layer<T>* layer = layers; layer < layers + count; layer++) {
#pragma omp for
            for (int64_t r = 0; r < rows; r++) {
                rms_norm(x + r * hidden, layer->input_norm, normed + r * hidden, hidden, epsilon);
                for (int64_t n = 0; n < qkv_width; n += LANES) {
                    Lanes bias = layer->qkv_bias ? load_part(layer->qkv_bias, n, qkv_width) : Lanes{};
                    store_part(bias, states + r * qkv_width, n, qkv_width);
                }
            }
            add_product(normed, layer->qkv, states, rows, hidden, qkv_width);
#pragma omp for
            for (int64_t r = 0; r < rows; r++) {
                float *token = states + r * qkv_width, *token_rotated = rotated + r * rotated_heads * width;
                for (int64_t at = 0; at < rotated_heads * width && layer->query_norm; at += width)
                    rms_norm(
                        token + at, at < heads * width ? layer->query_norm : layer->key_norm, token + at, width, epsilon
                    );
                rotate(token, cosines + r * width, sines + r * width, token_rotated, rotated_heads, width, false);
                append_to_cache(token_rotated + heads * width, layer->keys + r * row_stride);
                append_to_cache(token + rotated_heads * width, layer->values + r * row_stride);
            }
            attend_new_tokens(
                rotated, rotated_heads * width, layer->keys, layer->values, row_stride, group_stride, mask, rows, heads,
                groups, width, tokens, scale, branch
            );
            add_product(branch, layer->output, x, rows, heads * width, hidden);
#pragma omp for
            for (int64_t r = 0; r < rows; r++) {
                rms_norm(x + r * hidden, layer->post_attention_norm, normed + r * hidden, hidden, epsilon);
                std::fill(states + 2 * r * inner, states + 2 * (r + 1) * inner, 0.0f);
            }
            add_product(normed, layer->gate_up, states, rows, hidden, 2 * inner);
#pragma omp for
            for (int64_t r = 0; r < rows; r++)
                swiglu(states + 2 * r * inner, states + (2 * r + 1) * inner, branch + r * inner, inner);
            add_product(branch, layer->down, x, rows, inner, hidden);
        }
    }

    // Writes a row's new keys or values [groups, width] to the last position of its cache.
    void append_to_cache(const float* states, T* row) const {
        for (int64_t g = 0; g < groups; g++)
            for (int64_t d = 0; d < width; d += LANES)
                store_part(
                    load_part(states + g * width, d, width), row + g * group_stride + (tokens - 1) * width, d, width
                );
    }
};

}  // namespace
