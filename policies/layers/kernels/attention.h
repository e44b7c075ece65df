// Causal attention over packed sequences, with its gradient, and the softmax that it needs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "products.h"

namespace {

// Softmax of the first `count` of `seen` scores, in place; the rest become 0. Returns their log-sum-exp.
float softmax(float* scores, int64_t count, int64_t seen) {
    Lanes highest = all(scores[0]);
    for (int64_t j = 0; j < count; j += LANES) {
        Lanes score = first(count - j, load(scores + j), scores[0]);
        highest = score > highest ? score : highest;
    }
    const float most = greatest(highest);
    Lanes total{};
    for (int64_t j = 0; j < seen; j += LANES) {
        Lanes chance = first(count - j, exponential(load(scores + j) - most), 0);
        store(scores + j, chance);
        total += chance;
    }
    const float whole = sum(total), share = 1 / whole;
    for (int64_t j = 0; j < seen; j += LANES) store(scores + j, load(scores + j) * share);
    return most + std::log(whole);
}

constexpr int QUERIES = 16;  // per block, whose scores for all keys are held at once

template <typename T>
struct Attention {
    const T *query, *key, *value;  // [N, heads, width], [N, groups, width], [N, groups, width]
    const int64_t* starts;         // [rows + 1], where each row, a sequence, begins
    int64_t rows, heads, groups, width;
    float scale;

    int64_t wide() const { return up_to(width, TILE); }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t r = 0; r < rows; r++) most = std::max(most, starts[r + 1] - starts[r]);
        return up_to(most, TILE);
    }

    // Keys or values of one group and sequence as [tokens, wide], and as [wide, tokens] unless `turned` is null.
    void hold(const T* states, int64_t tokens, float* to, float* turned) const {
        const int64_t padded = up_to(tokens, TILE);
        gather(states, groups * width, tokens, width, to, wide(), padded, 1.0f);
        if (turned) transpose(to, padded, wide(), turned);
    }

    void forward(T* out, float* normalisers, int64_t threads) const {
        const int64_t wide = this->wide(), longest = this->longest();
#pragma omp parallel num_threads(threads)
        {
            Room room(3 * longest * wide + 2 * QUERIES * wide + QUERIES * longest);
            float *k = room(longest * wide), *kt = room(longest * wide), *v = room(longest * wide);
            float *q = room(QUERIES * wide), *made = room(QUERIES * wide), *weights = room(QUERIES * longest);
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t r = rows - 1; r >= 0; r--)
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t begin = starts[r], tokens = starts[r + 1] - begin, padded = up_to(tokens, TILE);
                    const int64_t of_group = (begin * groups + g) * width;
                    hold(key + of_group, tokens, k, kt);
                    hold(value + of_group, tokens, v, nullptr);
                    for (int64_t h = g * (heads / groups); h < (g + 1) * (heads / groups); h++)
                        for (int64_t i = 0; i < tokens; i += QUERIES) {
                            const int64_t here = std::min<int64_t>(QUERIES, tokens - i), seen = i + here;
                            const int64_t of_head = ((begin + i) * heads + h) * width;
                            gather(query + of_head, heads * width, here, width, q, wide, QUERIES, scale);
                            const int64_t columns = up_to(seen, TILE);
                            multiply(q, wide, 1, QUERIES, kt, padded, wide, columns, weights, padded, false);
                            for (int64_t n = 0; n < here; n++) {
                                const int64_t at = (begin + i + n) * heads + h;
                                normalisers[at] = softmax(weights + n * padded, i + n + 1, seen);
                            }
                            multiply(weights, padded, 1, QUERIES, v, wide, seen, wide, made, wide, false);
                            scatter(made, wide, out + of_head, heads * width, here, width, 1.0f);
                        }
                }
        }
    }

    void backward(
        const T* out, const float* normalisers, const T* gradient, T* of_query, T* of_key, T* of_value, int64_t threads
    ) const {
        const int64_t wide = this->wide(), longest = this->longest();
#pragma omp parallel num_threads(threads)
        {
            Room room(6 * longest * wide + 4 * QUERIES * wide + 2 * QUERIES * longest);
            float *k = room(longest * wide), *kt = room(longest * wide), *v = room(longest * wide);
            float *vt = room(longest * wide), *dk = room(longest * wide), *dv = room(longest * wide);
            float *q = room(QUERIES * wide), *dout = room(QUERIES * wide), *made = room(QUERIES * wide);
            float *weights = room(QUERIES * longest), *dweights = room(QUERIES * longest);
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t r = rows - 1; r >= 0; r--)
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t begin = starts[r], tokens = starts[r + 1] - begin, padded = up_to(tokens, TILE);
                    const int64_t of_group = (begin * groups + g) * width;
                    hold(key + of_group, tokens, k, kt);
                    hold(value + of_group, tokens, v, vt);
                    std::fill(dk, dk + padded * wide, 0.0f);
                    std::fill(dv, dv + padded * wide, 0.0f);
                    for (int64_t h = g * (heads / groups); h < (g + 1) * (heads / groups); h++)
                        for (int64_t i = 0; i < tokens; i += QUERIES) {
                            const int64_t here = std::min<int64_t>(QUERIES, tokens - i), seen = i + here;
                            const int64_t columns = up_to(seen, TILE), of_head = ((begin + i) * heads + h) * width;
                            gather(query + of_head, heads * width, here, width, q, wide, QUERIES, scale);
                            gather(gradient + of_head, heads * width, here, width, dout, wide, QUERIES, 1.0f);
                            multiply(q, wide, 1, QUERIES, kt, padded, wide, columns, weights, padded, false);
                            multiply(dout, wide, 1, QUERIES, vt, padded, wide, columns, dweights, padded, false);
                            for (int64_t n = 0; n < QUERIES; n++) {
                                float* p = weights + n * padded;
                                float* ds = dweights + n * padded;
                                if (n >= here) {
                                    std::fill(p, p + columns, 0.0f);
                                    std::fill(ds, ds + columns, 0.0f);
                                    continue;
                                }
                                Lanes along{};
                                const T* made_then = out + of_head + n * heads * width;
                                for (int64_t d = 0; d < width; d += LANES)
                                    along += take(made_then, d, width) * load(dout + n * wide + d);
                                const float mean = sum(along);
                                const float normaliser = normalisers[(begin + i + n) * heads + h];
                                for (int64_t j = 0; j < columns; j += LANES) {
                                    Lanes chance = first(i + n + 1 - j, exponential(load(p + j) - normaliser), 0);
                                    store(p + j, chance);
                                    store(ds + j, chance * (load(ds + j) - mean));
                                }
                            }
                            multiply(dweights, padded, 1, QUERIES, k, wide, seen, wide, made, wide, false);
                            scatter(made, wide, of_query + of_head, heads * width, here, width, scale);
                            const int64_t keys = up_to(seen, HIGH);
                            multiply(weights, 1, padded, keys, dout, wide, here, wide, dv, wide, true);
                            multiply(dweights, 1, padded, keys, q, wide, here, wide, dk, wide, true);
                        }
                    scatter(dk, wide, of_key + of_group, groups * width, tokens, width, 1.0f);
                    scatter(dv, wide, of_value + of_group, groups * width, tokens, width, 1.0f);
                }
        }
    }
};

}  // namespace
