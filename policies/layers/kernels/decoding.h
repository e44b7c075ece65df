// One new token per sequence, here a row, through all layers of a Llama.
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
    const float* query, const T* keys, const T* values, int64_t wide, const int64_t* seen, int64_t tokens,
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
        if (!seen[t]) weights[t] = -INFINITY;
    softmax(weights, tokens, tokens);
    for (int64_t d = 0; d < wide; d += TILE)
        product<1, WIDE>(weights, 0, 1, values + d, wide, tokens, out + d, wide, false);
}

// Attention of one new token per row to the row's KV cache. All threads of a team call it together.
// query: [rows, heads, width], of stride `query_row` between rows; keys, values: [rows, groups, tokens, width], of
// strides `of_row` and `of_group`; seen: [rows, tokens], the mask; out: [rows, heads, width].
template <typename X, typename T>
void attend_new(
    const X* query, int64_t query_row, const T* keys, const T* values, int64_t of_row, int64_t of_group,
    const int64_t* seen, int64_t rows, int64_t heads, int64_t groups, int64_t width, int64_t tokens, float scale, X* out
) {
    const int64_t wide = up_to(width, TILE), padded = up_to(tokens, LANES), copied = wide > width ? tokens * wide : 0;
    Room room(2 * wide + padded + 2 * copied);
    float *q = room(wide), *made = room(wide), *weights = room(padded), *k = room(copied), *v = room(copied);
#pragma omp for collapse(2)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t held = r * of_row + h / (heads / groups) * of_group;
            gather(query + r * query_row + h * width, 0, 1, width, q, wide, 1, scale);
            if (copied) {
                gather(keys + held, width, tokens, width, k, wide, tokens, 1.0f);
                gather(values + held, width, tokens, width, v, wide, tokens, 1.0f);
                attend(q, k, v, wide, seen + r * tokens, tokens, weights, made);
            } else {
                attend(q, keys + held, values + held, wide, seen + r * tokens, tokens, weights, made);
            }
            scatter(made, wide, out + (r * heads + h) * width, 0, 1, width, 1.0f);
        }
}

// Dot products of R rows with LANES / R rows of a weight: out[r · LANES / R + n] = Σ_k x[r · inner + k] · weight[n][k].
template <int R, typename T>
inline void dots(const float* x, const T* const* weight, int64_t inner, float* out) {
    constexpr int N = LANES / R;
    Lanes made[LANES] = {};
    const auto along = [&](int64_t k, auto at) {
        Lanes weights[N];
        for (int n = 0; n < N; n++) weights[n] = at(weight[n], k);
        for (int r = 0; r < R; r++) {
            const Lanes own = at(x + r * inner, k);
            for (int n = 0; n < N; n++) made[r * N + n] += own * weights[n];
        }
    };
    int64_t k = 0;
    for (; k + LANES <= inner; k += LANES) along(k, [](const auto* from, int64_t i) { return load(from + i); });
    if (k < inner) along(k, [&](const auto* from, int64_t i) { return take(from, i, inner); });
    store(out, sums(made));
}

// Adds to `out`, R rows at a time from `row` on, their dot products with `outputs` rows of a weight. Returns the first
// row that is not done.
template <int R, typename T>
inline int64_t add_dots(
    const float* x, const T* weight, float* out, int64_t row, int64_t rows, int64_t inner, int64_t outer,
    int64_t outputs
) {
    constexpr int N = LANES / R;
    for (; row + R <= rows; row += R)
        for (int64_t n = 0; n < outputs; n += N) {
            const T* own[N];
            for (int i = 0; i < N; i++) own[i] = weight + std::min(n + i, outputs - 1) * inner;
            float made[LANES];
            dots<R>(x + row * inner, own, inner, made);
            for (int r = 0; r < R; r++)
                for (int64_t i = 0; i < std::min<int64_t>(N, outputs - n); i++)
                    out[(row + r) * outer + n + i] += made[r * N + i];
        }
    return row;
}

// out += x · weightᵀ for few rows. All threads of a team call it together. x: [rows, inner]; weight: [outer, inner];
// out: [rows, outer].
template <typename T>
void add_product(const float* x, const T* weight, float* out, int64_t rows, int64_t inner, int64_t outer) {
#pragma omp for
    for (int64_t n = 0; n < outer; n += LANES) {
        const T* own = weight + n * inner;
        const int64_t outputs = std::min<int64_t>(LANES, outer - n);
        int64_t row = add_dots<4>(x, own, out + n, 0, rows, inner, outer, outputs);
        row = add_dots<2>(x, own, out + n, row, rows, inner, outer, outputs);
        add_dots<1>(x, own, out + n, row, rows, inner, outer, outputs);
    }
}

// One layer's weights [outputs, inputs], stacked where they have the same input (q, k, v; gate, up), and its KV cache.
// bias, query_norm and key_norm are null in a model that has none. `addresses` in `decode_step.py` fills these fields.
template <typename T>
struct Layer {
    const T *norm, *inward, *bias, *query_norm, *key_norm, *outward, *norm_after, *up, *down;
    T *keys, *values;
};

// The layers of a Llama for one new token per row, the last of the `tokens` in its KV cache.
template <typename T>
struct Stack {
    const Layer<T>* layers;
    int64_t count, rows, hidden, heads, groups, width, inner;
    const T *cosines, *sines;           // [rows, width]
    int64_t of_row, of_group, tokens;   // strides of the KV cache, and its length S
    const int64_t* seen;                // [rows, tokens], 0 where a token is masked
    float epsilon, scale;
    int64_t threads;

    // x: [rows, hidden], in place.
    void run(float* x) const {
        const int64_t turned = heads + groups, all = (turned + groups) * width;
        const int64_t most = std::max(std::max(hidden, heads * width), inner);
        Room room(rows * (2 * most + std::max(all, 2 * inner) + turned * width) + 4 * LANES);
        float *given = room(rows * most), *made = room(rows * most);
        float *states = room(rows * std::max(all, 2 * inner)), *rotated = room(rows * turned * width);
#pragma omp parallel num_threads(threads)
        for (const Layer<T>* layer = layers; layer < layers + count; layer++) {
#pragma omp for
            for (int64_t r = 0; r < rows; r++) {
                norm(x + r * hidden, layer->norm, given + r * hidden, hidden, epsilon);
                for (int64_t n = 0; n < all; n += LANES)
                    give(layer->bias ? take(layer->bias, n, all) : Lanes{}, states + r * all, n, all);
            }
            add_product(given, layer->inward, states, rows, hidden, all);
#pragma omp for
            for (int64_t r = 0; r < rows; r++) {
                float *own = states + r * all, *to = rotated + r * turned * width;
                for (int64_t at = 0; at < turned * width && layer->query_norm; at += width)
                    norm(own + at, at < heads * width ? layer->query_norm : layer->key_norm, own + at, width, epsilon);
                rotate(own, cosines + r * width, sines + r * width, to, turned, width, false);
                hold(to + heads * width, layer->keys + r * of_row);
                hold(own + turned * width, layer->values + r * of_row);
            }
            attend_new(
                rotated, turned * width, layer->keys, layer->values, of_row, of_group, seen, rows, heads, groups, width,
                tokens, scale, made
            );
            add_product(made, layer->outward, x, rows, heads * width, hidden);
#pragma omp for
            for (int64_t r = 0; r < rows; r++) {
                norm(x + r * hidden, layer->norm_after, given + r * hidden, hidden, epsilon);
                std::fill(states + 2 * r * inner, states + 2 * (r + 1) * inner, 0.0f);
            }
            add_product(given, layer->up, states, rows, hidden, 2 * inner);
#pragma omp for
            for (int64_t r = 0; r < rows; r++)
                gate(states + 2 * r * inner, states + (2 * r + 1) * inner, made + r * inner, inner);
            add_product(made, layer->down, x, rows, inner, hidden);
        }
    }

    // Writes a row's new keys or values [groups, width] to the last place of its cache.
    void hold(const float* states, T* row) const {
        for (int64_t g = 0; g < groups; g++)
            for (int64_t d = 0; d < width; d += LANES)
                give(take(states + g * width, d, width), row + g * of_group + (tokens - 1) * width, d, width);
    }
};

}  // namespace
