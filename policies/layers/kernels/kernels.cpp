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

// The functions of these files for one type of number, with C linkage.
#define FOR_TYPE(T, NAME)                                                                                              \
    void attention_##NAME(                                                                                             \
        const T* query, const T* key, const T* value, const int64_t* cu_seqlens, int64_t sequences, int64_t heads,     \
        int64_t groups, int64_t width, float scale, T* out, float* normalisers, int64_t threads                        \
    ) {                                                                                                                \
        Attention<T>{query, key, value, cu_seqlens, sequences, heads, groups, width, scale}.forward(                   \
            out, normalisers, threads                                                                                  \
        );                                                                                                             \
    }                                                                                                                  \
    void attention_backward_##NAME(                                                                                    \
        const T* query, const T* key, const T* value, const int64_t* cu_seqlens, int64_t sequences, int64_t heads,     \
        int64_t groups, int64_t width, float scale, const T* out, const float* normalisers, const T* out_gradient,     \
        T* query_gradient, T* key_gradient, T* value_gradient, int64_t threads                                         \
    ) {                                                                                                                \
        Attention<T>{query, key, value, cu_seqlens, sequences, heads, groups, width, scale}.backward(                  \
            out, normalisers, out_gradient, query_gradient, key_gradient, value_gradient, threads                      \
        );                                                                                                             \
    }                                                                                                                  \
    void attend_new_tokens_##NAME(                                                                                     \
        const T* query, int64_t query_stride, const T* keys, const T* values, int64_t row_stride,                      \
        int64_t group_stride, const int64_t* mask, int64_t rows, int64_t heads, int64_t groups, int64_t width,         \
        int64_t tokens, float scale, T* out, int64_t threads                                                           \
    ) {                                                                                                                \
        _Pragma("omp parallel num_threads(threads) if (rows * heads * tokens * width > SERIAL_SIZE)")                  \
        attend_new_tokens(                                                                                             \
            query, query_stride, keys, values, row_stride, group_stride, mask, rows, heads, groups, width, tokens,     \
            scale, out                                                                                                 \
        );                                                                                                             \
    }                                                                                                                  \
    void rms_norm_##NAME(                                                                                              \
        const T* x, const T* weight, T* out, float* scales, int64_t tokens, int64_t width, float epsilon,              \
        int64_t threads                                                                                                \
    ) {                                                                                                                \
        rms_norm(x, weight, out, scales, tokens, width, epsilon, threads);                                             \
    }                                                                                                                  \
    void rms_norm_backward_##NAME(                                                                                     \
        const T* x, const T* weight, const float* scales, const T* out_gradient, T* x_gradient, int64_t tokens,        \
        int64_t width, int64_t threads                                                                                 \
    ) {                                                                                                                \
        rms_norm_backward(x, weight, scales, out_gradient, x_gradient, tokens, width, threads);                        \
    }                                                                                                                  \
    void rotate_##NAME(                                                                                                \
        const T* states, const T* cosines, const T* sines, T* out, int64_t tokens, int64_t heads, int64_t width,       \
        int64_t inverse, int64_t threads                                                                               \
    ) {                                                                                                                \
        rotate(states, cosines, sines, out, tokens, heads, width, inverse, threads);                                   \
    }                                                                                                                  \
    void swiglu_##NAME(const T* gates, const T* ups, T* out, int64_t tokens, int64_t width, int64_t threads) {         \
        swiglu(gates, ups, out, tokens, width, threads);                                                               \
    }                                                                                                                  \
    void swiglu_backward_##NAME(                                                                                       \
        const T* gates, const T* ups, const T* out_gradient, T* gates_gradient, T* ups_gradient, int64_t tokens,       \
        int64_t width, int64_t threads                                                                                 \
    ) {                                                                                                                \
        swiglu_backward(gates, ups, out_gradient, gates_gradient, ups_gradient, tokens, width, threads);               \
    }                                                                                                                  \
    void logprobs_##NAME(                                                                                              \
        const T* logits, const int64_t* tokens, int64_t positions, int64_t vocabulary, float temperature,              \
        float* chosen, float* entropies, T* logits_gradient, int64_t threads                                           \
    ) {                                                                                                                \
        logprobs(logits, tokens, positions, vocabulary, temperature, chosen, entropies, logits_gradient, threads);     \
    }                                                                                                                  \
    void decode_layers_##NAME(                                                                                         \
        const Layer<T>* layers, int64_t count, int64_t rows, int64_t hidden, int64_t heads, int64_t groups,            \
        int64_t width, int64_t inner, const T* cosines, const T* sines, int64_t row_stride, int64_t group_stride,      \
        int64_t tokens, const int64_t* mask, float epsilon, float scale, float* x, int64_t threads                     \
    ) {                                                                                                                \
        DecoderStack<T>{layers, count, rows, hidden, heads, groups, width, inner, cosines, sines, row_stride,          \
                        group_stride, tokens, mask, epsilon, scale, threads}                                           \
            .run(x);                                                                                                   \
    }

extern "C" {
FOR_TYPE(float, float32)
FOR_TYPE(bfloat16, bfloat16)
}
