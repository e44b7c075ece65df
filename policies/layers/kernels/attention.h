// Causal attention over packed sequences, with its gradient, and the softmax that it needs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "products.h"

namespace {

// Softmax of the first `count` of `seen` scores, in place; the others become 0. Returns the log-sum-exp.
float softmax(float* scores, int64_t count, int64_t seen) {
    Lanes maxima = broadcast(scores[0]);
    for (int64_t j = 0; j < count; j += LANES) {
        Lanes score = first(count - j, load(scores + j), scores[0]);
        maxima = score > maxima ? score : maxima;
    }
    const float max_score = maximum(maxima);
    Lanes total{};
    for (int64_t j = 0; j < seen; j += LANES) {
        Lanes probability = first(count - j, exponential(load(scores + j) - max_score), 0);
        store(scores + j, probability);
        total += probability;
    }
    const float normaliser = sum(total), reciprocal = 1 / normaliser;
    for (int64_t j = 0; j < seen; j += LANES) store(scores + j, load(scores + j) * reciprocal);
    return max_score + std::log(normaliser);
}

constexpr int QUERIES = 16;  // queries per block: the scores of a block for all its keys are held at once

template <typename T>
struct Attention {
    const T *query, *key, *value;  // [N, heads, width], [N, groups, width], [N, groups, width]
    const int64_t* cu_seqlens;     // [sequences + 1], where each sequence begins, and where the last one ends
    int64_t sequences, heads, groups, width;
    float scale;

    // The width of a head, padded to whole tiles.
    int64_t wide() const { return round_up(width, TILE); }
    // Tokens of the longest sequence, padded to whole tiles.
    int64_t longest() const {
        int64_t max_tokens = 0;
        for (int64_t r = 0; r < sequences; r++) max_tokens = std::max(max_tokens, cu_seqlens[r + 1] - cu_seqlens[r]);
        return round_up(max_tokens, TILE);
    }

    // Copies keys or values of one group and sequence as [tokens, wide], and as [wide, tokens] unless `transposed` is
    // null.
    void gather_group(const T* states, int64_t tokens, float* to, float* transposed) const {
        const int64_t padded = round_up(tokens, TILE);
        gather(states, groups * width, tokens, width, to, wide(), padded, 1.0f);
        if (transposed) transpose(to, padded, wide(), transposed);
    }

    void forward(T* out, float* normalisers, int64_t threads) const {
        const int64_t wide = this->wide(), longest = this->longest();
#pragma omp parallel num_threads(threads)
        {
            Scratch scratch(3 * longest * wide + 2 * QUERIES * wide + QUERIES * longest);
            float *k = scratch(longest * wide), *kt = scratch(longest * wide), *v = scratch(longest * wide);
            float *q = scratch(QUERIES * wide), *block = scratch(QUERIES * wide), *weights = scratch(QUERIES * longest);
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t r = sequences - 1; r >= 0; r--)
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t begin = cu_seqlens[r], tokens = cu_seqlens[r + 1] - begin;
                    const int64_t padded = round_up(tokens, TILE);
                    const int64_t group_offset = (begin * groups + g) * width;
                    gather_group(key + group_offset, tokens, k, kt);
                    gather_group(value + group_offset, tokens, v, nullptr);
                    for (int64_t h = g * (heads / groups); h < (g + 1) * (heads / groups); h++)
                        for (int64_t i = 0; i < tokens; i += QUERIES) {
                            const int64_t queries = std::min<int64_t>(QUERIES, tokens - i), seen = i + queries;
                            const int64_t head_offset = ((begin + i) * heads + h) * width;
                            gather(query + head_offset, heads * width, queries, width, q, wide, QUERIES, scale);
                            const int64_t columns = round_up(seen, TILE);
                            multiply(q, wide, 1, QUERIES, kt, padded, wide, columns, weights, padded, false);
                            for (int64_t n = 0; n < queries; n++) {
                                const int64_t at = (begin + i + n) * heads + h;
                                normalisers[at] = softmax(weights + n * padded, i + n + 1, seen);
                            }
                            multiply(weights, padded, 1, QUERIES, v, wide, seen, wide, block, wide, false);
                            scatter(block, wide, out + head_offset, heads * width, queries, width, 1.0f);
                        }
                }
        }
    }

    void backward(
        const T* out, const float* normalisers, const T* out_gradient, T* query_gradient, T* key_gradient,
        T* value_gradient, int64_t threads
    ) const {
        const int64_t wide = this->wide(), longest = this->longest();
#pragma omp parallel num_threads(threads)
        {
            Scratch scratch(6 * longest * wide + 4 * QUERIES * wide + 2 * QUERIES * longest);
            float *k = scratch(longest * wide), *kt = scratch(longest * wide), *v = scratch(longest * wide);
            float *vt = scratch(longest * wide), *dk = scratch(longest * wide), *dv = scratch(longest * wide);
            float *q = scratch(QUERIES * wide), *dout = scratch(QUERIES * wide), *block = scratch(QUERIES * wide);
            float *weights = scratch(QUERIES * longest), *dweights = scratch(QUERIES * longest);
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t r = sequences - 1; r >= 0; r--)
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t begin = cu_seqlens[r], tokens = cu_seqlens[r + 1] - begin;
                    const int64_t padded = round_up(tokens, TILE);
                    const int64_t group_offset = (begin * groups + g) * width;
                    gather_group(key + group_offset, tokens, k, kt);
                    gather_group(value + group_offset, tokens, v, vt);
                    std::fill(dk, dk + padded * wide, 0.0f);
                    std::fill(dv, dv + padded * wide, 0.0f);
                    for (int64_t h = g * (heads / groups); h < (g + 1) * (heads / groups); h++)
                        for (int64_t i = 0; i < tokens; i += QUERIES) {
                            const int64_t queries = std::min<int64_t>(QUERIES, tokens - i), seen = i + queries;
                            const int64_t columns = round_up(seen, TILE);
                            const int64_t head_offset = ((begin + i) * heads + h) * width;
                            gather(query + head_offset, heads * width, queries, width, q, wide, QUERIES, scale);
                            gather(
                                out_gradient + head_offset, heads * width, queries, width, dout, wide, QUERIES, 1.0f
                            );
                            multiply(q, wide, 1, QUERIES, kt, padded, wide, columns, weights, padded, false);
                            multiply(dout, wide, 1, QUERIES, vt, padded, wide, columns, dweights, padded, false);
                            for (int64_t n = 0; n < QUERIES; n++) {
                                float* p = weights + n * padded;
                                float* ds = dweights + n * padded;
                                if (n >= queries) {
                                    std::fill(p, p + columns, 0.0f);
                                    std::fill(ds, ds + columns, 0.0f);
                                    continue;
                                }
                                Lanes products{};
                                const T* head_out = out + head_offset + n * heads * width;
                                for (int64_t d = 0; d < width; d += LANES)
                                    products += load_part(head_out, d, width) * load(dout + n * wide + d);
                                const float mean = sum(products);
                                const float normaliser = normalisers[(begin + i + n) * heads + h];
                                for (int64_t j = 0; j < columns; j += LANES) {
                                    Lanes probability = first(i + n + 1 - j, exponential(load(p + j) - normaliser), 0);
                                    store(p + j, probability);
                                    store(ds + j, probability * (load(ds + j) - mean));
                                }
                            }
                            multiply(dweights, padded, 1, QUERIES, k, wide, seen, wide, block, wide, false);
                            scatter(block, wide, query_gradient + head_offset, heads * width, queries, width, scale);
                            const int64_t keys = round_up(seen, HIGH);
                            multiply(weights, 1, padded, keys, dout, wide, queries, wide, dv, wide, true);
                            multiply(dweights, 1, padded, keys, q, wide, queries, wide, dk, wide, true);
                        }
                    scatter(dk, wide, key_gradient + group_offset, groups * width, tokens, width, 1.0f);
                    scatter(dv, wide, value_gradient + group_offset, groups * width, tokens, width, 1.0f);
                }
        }
    }
};

}  // namespace
