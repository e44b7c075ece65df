// Operations on each token alone: RMSNorm, rotary positions, SwiGLU and log-probabilities.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "products.h"

namespace {

// weight · x / √(mean x² + ε) (Zhang & Sennrich 2019). Returns 1 / √(mean x² + ε).
template <typename X, typename T>
inline float norm(const X* x, const T* weight, X* out, int64_t width, float epsilon) {
    Lanes squares{};
    for (int64_t d = 0; d < width; d += LANES) {
        Lanes part = take(x, d, width);
        squares += part * part;
    }
    const float scale = 1 / std::sqrt(sum(squares) / width + epsilon);
    for (int64_t d = 0; d < width; d += LANES) give(take(x, d, width) * scale * take(weight, d, width), out, d, width);
    return scale;
}

template <typename T>
void norm(
    const T* x, const T* weight, T* out, float* scales, int64_t tokens, int64_t width, float epsilon, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (tokens * width > LITTLE)
    for (int64_t t = 0; t < tokens; t++) scales[t] = norm(x + t * width, weight, out + t * width, width, epsilon);
}

template <typename T>
void norm_backward(
    const T* x, const T* weight, const float* scales, const T* gradient, T* of_x, int64_t tokens, int64_t width,
    int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (tokens * width > LITTLE)
    for (int64_t t = 0; t < tokens; t++) {
        const T *own = x + t * width, *outer = gradient + t * width;
        Lanes dot{};
        for (int64_t d = 0; d < width; d += LANES)
            dot += take(outer, d, width) * take(weight, d, width) * take(own, d, width);
        const float scale = scales[t], along = sum(dot) * scale * scale / width;
        for (int64_t d = 0; d < width; d += LANES) {
            Lanes inner = take(outer, d, width) * take(weight, d, width);
            give((inner - take(own, d, width) * along) * scale, of_x + t * width, d, width);
        }
    }
}

// Rotates both halves of each head of a token against each other (Su et al. 2021); back: by the inverse rotation.
// states: [heads, width]; cosines, sines: [width].
template <typename X, typename T>
inline void rotate(
    const X* states, const T* cosines, const T* sines, X* out, int64_t heads, int64_t width, bool back
) {
    const int64_t half = width / 2;
    for (int64_t d = 0; d < half; d += LANES) {
        Lanes cos1 = take(cosines, d, half), cos2 = take(cosines + half, d, half);
        Lanes sin1 = take(sines, d, half), sin2 = take(sines + half, d, half);
        Lanes of1 = back ? sin2 : -sin1, of2 = back ? -sin1 : sin2;
        for (int64_t at = 0; at < heads * width; at += width) {
            Lanes one = take(states + at, d, half), other = take(states + at + half, d, half);
            give(one * cos1 + other * of1, out + at, d, half);
            give(other * cos2 + one * of2, out + at + half, d, half);
        }
    }
}

// states: [tokens, heads, width]; cosines, sines: [tokens, width].
template <typename T>
void rotate(
    const T* states, const T* cosines, const T* sines, T* out, int64_t tokens, int64_t heads, int64_t width,
    int64_t back, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * width > LITTLE)
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t at = t * heads * width, angle = t * width;
        rotate(states + at, cosines + angle, sines + angle, out + at, heads, width, back);
    }
}

// silu(gate) · up (Shazeer 2020).
template <typename T>
inline void gate(const T* gates, const T* ups, T* out, int64_t width) {
    for (int64_t d = 0; d < width; d += LANES) {
        Lanes g = take(gates, d, width);
        give(g * sigmoid(g) * take(ups, d, width), out, d, width);
    }
}

template <typename T>
void gate(const T* gates, const T* ups, T* out, int64_t tokens, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > LITTLE)
    for (int64_t t = 0; t < tokens; t++) gate(gates + t * width, ups + t * width, out + t * width, width);
}

template <typename T>
void gate_backward(
    const T* gates, const T* ups, const T* gradient, T* of_gates, T* of_ups, int64_t tokens, int64_t width,
    int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (tokens * width > LITTLE)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t d = 0, at = t * width; d < width; d += LANES) {
            Lanes g = take(gates + at, d, width), outer = take(gradient + at, d, width), open = sigmoid(g);
            give(outer * g * open, of_ups + at, d, width);
            give(outer * take(ups + at, d, width) * open * (1.0f + g * (1.0f - open)), of_gates + at, d, width);
        }
}

// Under softmax(logits / temperature): the log-probability of each position's token, the entropy and, unless
// `of_logits` is null, softmax - 1[token], which is -temperature times the log-probability's gradient in the logits.
// logits, of_logits: [positions, vocabulary].
template <typename T>
void logprobs(
    const T* logits, const int64_t* tokens, int64_t positions, int64_t vocabulary, float temperature, float* chosen,
    float* entropies, T* of_logits, int64_t threads
) {
#pragma omp parallel num_threads(threads) if (positions * vocabulary > LITTLE)
    {
        Room room(vocabulary + LANES);
        float* powers = room(vocabulary + LANES);
#pragma omp for
        for (int64_t p = 0; p < positions; p++) {
            const T* own = logits + p * vocabulary;
            const float some = take(own, 0, 1)[0];
            Lanes highest = all(some);
            for (int64_t i = 0; i < vocabulary; i += LANES) {
                Lanes x = first(vocabulary - i, take(own, i, vocabulary), some);
                highest = x > highest ? x : highest;
            }
            const float most = greatest(highest);
            Lanes total{}, weighted{};
            for (int64_t i = 0; i < vocabulary; i += LANES) {
                Lanes below = (take(own, i, vocabulary) - most) / temperature;
                below = below < LEAST ? all(LEAST) : below;  // 0 · -inf would be a NaN
                Lanes power = first(vocabulary - i, exponential(below), 0);
                store(powers + i, power);
                total += power;
                weighted += power * below;
            }
            const float whole = sum(total), share = 1 / whole;
            const int64_t token = tokens[p];
            chosen[p] = (take(own, token, token + 1)[0] - most) / temperature - std::log(whole);
            entropies[p] = std::log(whole) - sum(weighted) * share;
            if (!of_logits) continue;
            powers[token] -= whole;
            for (int64_t i = 0; i < vocabulary; i += LANES)
                give(load(powers + i) * share, of_logits + p * vocabulary, i, vocabulary);
        }
    }
}

}  // namespace
