// Small matrix products, and the scratch memory of one thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "lanes.h"

namespace {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// out[r][0..V·LANES) = Σ_k weights[r·row + k·step] · matrix[k][0..V·LANES), added to out if `add`.
template <int R, int V, typename T>
inline void product(
    const float* weights, int64_t row, int64_t step, const T* matrix, int64_t width, int64_t count, float* out,
    int64_t out_width, bool add
) {
    Lanes sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = add ? load(out + r * out_width + v * LANES) : Lanes{};
    for (int64_t k = 0; k < count; k++) {
        Lanes values[V];
        for (int v = 0; v < V; v++) values[v] = load(matrix + k * width + v * LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] += weights[r * row + k * step] * values[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * out_width + v * LANES, sums[r][v]);
}

constexpr int HIGH = 4;             // rows of a product that are computed at once: HIGH · WIDE sums fit the registers
constexpr int WIDE = 2;             // vectors of each such row
constexpr int TILE = WIDE * LANES;  // columns of a product that are computed at once

// [rows, count] by [count, columns], where rows is a multiple of HIGH and columns one of TILE.
inline void multiply(
    const float* weights, int64_t row, int64_t step, int64_t rows, const float* matrix, int64_t width, int64_t count,
    int64_t columns, float* out, int64_t out_width, bool add
) {
    for (int64_t c = 0; c < columns; c += TILE)
        for (int64_t r = 0; r < rows; r += HIGH)
            product<HIGH, WIDE>(
                weights + r * row, row, step, matrix + c, width, count, out + r * out_width + c, out_width, add
            );
}

// Scratch memory of one thread, handed out as arrays of floats, each aligned to a vector.
class Scratch {
  public:
    explicit Scratch(int64_t floats) : start(static_cast<float*>(std::aligned_alloc(64, round_up(4 * floats, 64)))) {}
    ~Scratch() { std::free(start); }
    Scratch(const Scratch&) = delete;
    float* operator()(int64_t floats) {
        float* array = start + used;
        used += round_up(floats, LANES);
        return array;
    }

  private:
    float* start;
    int64_t used = 0;
};

// Copies the tokens of one head, `stride` apart, to [padded_tokens, wide], times `scale`. Zeros pad each token from
// width to wide, and follow the last token.
template <typename T>
void gather(
    const T* states, int64_t stride, int64_t tokens, int64_t width, float* to, int64_t wide, int64_t padded_tokens,
    float scale
) {
    for (int64_t t = 0; t < padded_tokens; t++)
        for (int64_t d = 0; d < wide; d += LANES) {
            const bool exists = t < tokens && d < width;
            store(to + t * wide + d, exists ? load_part(states + t * stride, d, width) * scale : Lanes{});
        }
}

// The inverse: copies [tokens, wide] to the tokens of one head, `stride` apart, times `scale`.
template <typename T>
void scatter(const float* from, int64_t wide, T* states, int64_t stride, int64_t tokens, int64_t width, float scale) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t d = 0; d < width; d += LANES)
            store_part(load(from + t * wide + d) * scale, states + t * stride, d, width);
}

// [rows, columns] to [columns, rows], where rows is a multiple of LANES.
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
    for (int64_t r0 = 0; r0 < rows; r0 += LANES)
        for (int64_t c = 0; c < columns; c++)
            for (int64_t r = r0; r < r0 + LANES; r++) to[c * rows + r] = from[r * columns + c];
}

}  // namespace
