// Operations on single tokens: RMSNorm, rotary positions, SwiGLU and log-probabilities.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "products.h"

namespace {

// weight · x / √(mean x² + ε) (Zhang & Sennrich 2019). Returns 1 / √(mean x² + ε).
template <typename X, typename T>
inline float rms_norm(const X* x, const T* weight, X* out, int64_t width, float epsilon) {
    Lanes squares{};
    for (int64_t d = 0; d < width; d += LANES) {
        Lanes part = load_part(x, d, width);
        squares += part * part;
    }
    const float scale = 1 / std::sqrt(sum(squares) / width + epsilon);
    for (int64_t d = 0; d < width; d += LANES)
        store_part(load_part(x, d, width) * scale * load_part(weight, d, width), out, d, width);
    return scale;
}

template <typename T>
void rms_norm(
    const T* x, const T* weight, T* out, float* scales, int64_t tokens, int64_t width, float epsilon, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (tokens * width > SERIAL_SIZE)
    for (int64_t t = 0; t < tokens; t++) scales[t] = rms_norm(x + t * width, weight, out + t * width, width, epsilon);
}

template <typename T>
void rms_norm_backward(
    const T* x, const T* weight, const float* scales, const T* out_gradient, T* x_gradient, int64_t tokens,
    int64_t width, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (tokens * width > SERIAL_SIZE)
    for (int64_t t = 0; t < tokens; t++) {
        const T *token = x + t * width, *incoming = out_gradient + t * width;
        Lanes dot{};
        for (int64_t d = 0; d < width; d += LANES)
            dot += load_part(incoming, d, width) * load_part(weight, d, width) * load_part(token, d, width);
        const float scale = scales[t], projection = sum(dot) * scale * scale / width;
        for (int64_t d = 0; d < width; d += LANES) {
            Lanes inner = load_part(incoming, d, width) * load_part(weight, d, width);
            store_part((inner - load_part(token, d, width) * projection) * scale, x_gradient + t * width, d, width);
        }
    }
}

// Rotates the two halves of each head of a token as pairs (Su et al. 2021); inverse: by the negative angles.
// states: [heads, width]; cosines, sines: [width].
template <typename X, typename T>
inline void rotate(
    const X* states, const T* cosines, const T* sines, X* out, int64_t heads, int64_t width, bool inverse
) {
    const int64_t half = width / 2;
    for (int64_t d = 0; d < half; d += LANES) {
        Lanes cos1 = load_part(cosines, d, half), cos2 = load_part(cosines + half, d, half);
        Lanes sin1 = load_part(sines, d, half), sin2 = load_part(sines + half, d, half);
        Lanes partner1 = inverse ? sin2 : -sin1, partner2 = inverse ? -sin1 : sin2;
        for (int64_t at = 0; at < heads * width; at += width) {
            Lanes one = load_part(states + at, d, half), other = load_part(states + at + half, d, half);
            store_part(one * cos1 + other * partner1, out + at, d, half);
            store_part(other * cos2 + one * partner2, out + at + half, d, half);
        }
    }
}

// states: [tokens, heads, width]; cosines, sines: [tokens, width].
template <typename T>
void rotate(
    const T* states, const T* cosines, const T* sines, T* out, int64_t tokens, int64_t heads, int64_t width,
    int64_t inverse, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * width > SERIAL_SIZE)
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t at = t * heads * width, angle = t * width;
        rotate(states + at, cosines + angle, sines + angle, out + at, heads, width, inverse);
    }
}

// silu(gate) · up (Shazeer 2020).
template <typename T>
inline void swiglu(const T* gates, const T* ups, T* out, int64_t width) {
    for (int64_t d = 0; d < width; d += LANES) {
        Lanes g = load_part(gates, d, width);
        store_part(g * sigmoid(g) * load_part(ups, d, width), out, d, width);
    }
}

template <typename T>
void swiglu(const T* gates, const T* ups, T* out, int64_t tokens, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > SERIAL_SIZE)
    for (int64_t t = 0; t < tokens; t++) swiglu(gates + t * width, ups + t * width, out + t * width, width);
}

template <typename T>
void swiglu_backward(
    const T* gates, const T* ups, const T* out_gradient, T* gates_gradient, T* ups_gradient, int64_t tokens,
    int64_t width, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (tokens * width > SERIAL_SIZE)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t d = 0, at = t * width; d < width; d += LANES) {
            Lanes g = load_part(gates + at, d, width), incoming = load_part(out_gradient + at, d, width);
            Lanes sigma = sigmoid(g);
            store_part(incoming * g * sigma, ups_gradient + at, d, width);
            Lanes up = load_part(ups + at, d, width);
            store_part(incoming * up * sigma * (1.0f + g * (1.0f - sigma)), gates_gradient + at, d, width);
        }
}

// Under softmax(logits / temperature): the log-probability of each position's token, the entropy and, unless
// `logits_gradient` is null, softmax - 1[token], which is -temperature times the log-probability's gradient in the
// logits. logits, logits_gradient: [positions, vocabulary].
template <typename T>
void logprobs(
    const T* logits, const int64_t* tokens, int64_t positions, int64_t vocabulary, float temperature, float* chosen,
    float* entropies, T* logits_gradient, int64_t threads
) {
#pragma omp parallel num_threads(threads) if (positions * vocabulary > SERIAL_SIZE)
    {
        Scratch scratch(vocabulary + LANES);
        float* powers = scratch(vocabulary + LANES);
#pragma omp for
        for (int64_t p = 0; p < positions; p++) {
            const T* row = logits + p * vocabulary;
            const float first_logit = load_part(row, 0, 1)[0];
            Lanes maxima = broadcast(first_logit);
            for (int64_t i = 0; i < vocabulary; i += LANES) {
                Lanes x = first(vocabulary - i, load_part(row, i, vocabulary), first_logit);
                maxima = x > maxima ? x : maxima;
            }
            const float max_logit = maximum(maxima);
            Lanes total{}, weighted{};
            for (int64_t i = 0; i < vocabulary; i += LANES) {
                Lanes below = (load_part(row, i, vocabulary) - max_logit) / temperature;
                below = below < MIN_EXPONENT ? broadcast(MIN_EXPONENT) : below;  // 0 · -inf would be a NaN
                Lanes power = first(vocabulary - i, exponential(below), 0);
                store(powers + i, power);
                total += power;
                weighted += power * below;
            }
            const float normaliser = sum(total), reciprocal = 1 / normaliser;
            const int64_t token = tokens[p];
            chosen[p] = (load_part(row, token, token + 1)[0] - max_logit) / temperature - std::log(normaliser);
            entropies[p] = std::log(normaliser) - sum(weighted) * reciprocal;
            if (!logits_gradient) continue;
            powers[token] -= normaliser;
            for (int64_t i = 0; i < vocabulary; i += LANES)
                store_part(load(powers + i) * reciprocal, logits_gradient + p * vocabulary, i, vocabulary);
        }
    }
}

}  // namespace
