// What torch does on a CPU in many passes over memory, in one: causal attention over packed sequences, RMSNorm with a
// frozen weight, rotary positions, SwiGLU and log-probabilities, each with its gradient; and, for decoding, one new
// token per sequence through all layers.
//
// Numbers are read and written as float or bfloat16 and computed in float. The order of operations of each result row
// depends neither on the other rows nor on the number of threads. `policies/layers/native.py` compiles this file, and
// `policies/layers/kernel_calls.py` describes and calls its functions.

#include <cstdint>

#include "attention.h"
#include "decoding.h"
#include "lanes.h"
#include "tokens.h"

// The functions of these files for one type of number, under names that C has.
#define FOR_TYPE(T, NAME)                                                                                              \
    void attention_##NAME(                                                                                             \
        const T* query, const T* key, const T* value, const int64_t* starts, int64_t rows, int64_t heads,              \
        int64_t groups, int64_t width, float scale, T* out, float* normalisers, int64_t threads                        \
    ) {                                                                                                                \
        Attention<T>{query, key, value, starts, rows, heads, groups, width, scale}.forward(out, normalisers, threads); \
    }                                                                                                                  \
    void attention_backward_##NAME(                                                                                    \
        const T* query, const T* key, const T* value, const int64_t* starts, int64_t rows, int64_t heads,              \
        int64_t groups, int64_t width, float scale, const T* out, const float* normalisers, const T* gradient,         \
        T* of_query, T* of_key, T* of_value, int64_t threads                                                           \
    ) {                                                                                                                \
        Attention<T>{query, key, value, starts, rows, heads, groups, width, scale}.backward(                           \
            out, normalisers, gradient, of_query, of_key, of_value, threads                                            \
        );                                                                                                             \
    }                                                                                                                  \
    void attend_new_##NAME(                                                                                            \
        const T* query, int64_t query_row, const T* keys, const T* values, int64_t of_row, int64_t of_group,           \
        const int64_t* seen, int64_t rows, int64_t heads, int64_t groups, int64_t width, int64_t tokens, float scale,  \
        T* out, int64_t threads                                                                                        \
    ) {                                                                                                                \
        _Pragma("omp parallel num_threads(threads) if (rows * heads * tokens * width > LITTLE)")                       \
        attend_new(                                                                                                    \
            query, query_row, keys, values, of_row, of_group, seen, rows, heads, groups, width, tokens, scale, out     \
        );                                                                                                             \
    }                                                                                                                  \
    void norm_##NAME(                                                                                                  \
        const T* x, const T* weight, T* out, float* scales, int64_t tokens, int64_t width, float epsilon,              \
        int64_t threads                                                                                                \
    ) {                                                                                                                \
        norm(x, weight, out, scales, tokens, width, epsilon, threads);                                                 \
    }                                                                                                                  \
    void norm_backward_##NAME(                                                                                         \
        const T* x, const T* weight, const float* scales, const T* gradient, T* of_x, int64_t tokens, int64_t width,   \
        int64_t threads                                                                                                \
    ) {                                                                                                                \
        norm_backward(x, weight, scales, gradient, of_x, tokens, width, threads);                                      \
    }                                                                                                                  \
    void rotate_##NAME(                                                                                                \
        const T* states, const T* cosines, const T* sines, T* out, int64_t tokens, int64_t heads,                      \
        int64_t width, int64_t back, int64_t threads                                                                   \
    ) {                                                                                                                \
        rotate(states, cosines, sines, out, tokens, heads, width, back, threads);                                      \
    }                                                                                                                  \
    void gate_##NAME(                                                                                                  \
        const T* gates, const T* ups, T* out, int64_t tokens, int64_t width, int64_t threads                           \
    ) {                                                                                                                \
        gate(gates, ups, out, tokens, width, threads);                                                                 \
    }                                                                                                                  \
    void gate_backward_##NAME(                                                                                         \
        const T* gates, const T* ups, const T* gradient, T* of_gates, T* of_ups, int64_t tokens, int64_t width,        \
        int64_t threads                                                                                                \
    ) {                                                                                                                \
        gate_backward(gates, ups, gradient, of_gates, of_ups, tokens, width, threads);                                 \
    }                                                                                                                  \
    void logprobs_##NAME(                                                                                              \
        const T* logits, const int64_t* tokens, int64_t positions, int64_t vocabulary, float temperature,              \
        float* chosen, float* entropies, T* of_logits, int64_t threads                                                 \
    ) {                                                                                                                \
        logprobs(logits, tokens, positions, vocabulary, temperature, chosen, entropies, of_logits, threads);           \
    }                                                                                                                  \
    void stack_##NAME(                                                                                                 \
        const Layer<T>* layers, int64_t count, int64_t rows, int64_t hidden, int64_t heads, int64_t groups,            \
        int64_t width, int64_t inner, const T* cosines, const T* sines, int64_t of_row, int64_t of_group,              \
        int64_t tokens, const int64_t* seen, float epsilon, float scale, float* x, int64_t threads                     \
    ) {                                                                                                                \
        Stack<T>{layers, count, rows, hidden, heads, groups, width, inner, cosines, sines, of_row, of_group, tokens,   \
                 seen, epsilon, scale, threads}                                                                        \
            .run(x);                                                                                                   \
    }

extern "C" {
FOR_TYPE(float, float32)
FOR_TYPE(bfloat16, bfloat16)
}
