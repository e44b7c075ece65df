// What torch does on a CPU in many passes over memory, in one: causal attention to rows that stand one after another,
// RMSNorm with a frozen weight, rotary positions, the gated unit and log-probabilities, each with its gradient; and,
// for decoding, one new token a row through all layers.
//
// Numbers come in float or bfloat16 and are computed with in float. Each row of a result is made in an order that
// depends neither on the other rows nor on how many threads there are. `policies/native.py` compiles this file and
// calls it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

// The bits of a value as those of another type of as many.
template <typename To, typename From>
inline To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline Lanes load(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Lanes load(const bfloat16* from) {
    Halves bits;
    std::memcpy(&bits, from, sizeof bits);
#ifdef __AVX512F__  // of the line below GCC makes five instructions
    Integers wide = as<Integers>(_mm512_cvtepu16_epi32(as<__m256i>(bits)));
#else
    Integers wide = __builtin_convertvector(bits, Integers);
#endif
    return as<Lanes>(wide << 16);
}

inline void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

// To the nearest, ties to even; what is no number stays none. Where the processor does it, denormal numbers become 0.
inline void store(bfloat16* to, Lanes x) {
#ifdef __AVX512BF16__
    Halves halves = as<Halves>(_mm512_cvtneps_pbh(as<__m512>(x)));
#else
    Integers bits = as<Integers>(x);
    Integers rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Halves halves = __builtin_convertvector(x == x ? rounded : 0x7fc0 - Integers{}, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

inline Lanes all(float x) { return x - Lanes{}; }
inline Integers all(int32_t x) { return x - Integers{}; }

// What `two` makes of all lanes, by halves.
template <typename Two>
inline float reduce(Lanes x, Two two) {
    float part[LANES];
    store(part, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) part[i] = two(part[i], part[i + half]);
    return part[0];
}

inline float sum(Lanes x) {
    return reduce(x, [](float a, float b) { return a + b; });
}

inline float greatest(Lanes x) {
    return reduce(x, [](float a, float b) { return a > b ? a : b; });
}

// Of two vectors, the sums of lanes that are DISTANCE apart: of the first in the lower half of each 2·DISTANCE lanes.
template <int DISTANCE>
inline Lanes fold(Lanes one, Lanes other) {
    Integers lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Integers near = lane + ((lane & DISTANCE) / DISTANCE) * (LANES - DISTANCE), far = near + DISTANCE;
    return __builtin_shuffle(one, other, near) + __builtin_shuffle(one, other, far);
}

// The sum of each of LANES vectors, which are lost.
inline Lanes sums(Lanes* x) {
    for (int i = 0; i < 8; i++) x[i] = fold<8>(x[i], x[i + 8]);
    for (int i = 0; i < 4; i++) x[i] = fold<4>(x[i], x[i + 4]);
    for (int i = 0; i < 2; i++) x[i] = fold<2>(x[i], x[i + 2]);
    return fold<1>(x[0], x[1]);
}

// The lanes before `count`, and `other` in place of those behind them.
inline Lanes first(int64_t count, Lanes x, float other) {
    const Integers lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < all(int32_t(std::min<int64_t>(count, LANES))) ? x : all(other);
}

// e^x to about one unit in the last place, between the least and the greatest normal number: x = n ln 2 + r, and a
// polynomial in r (Cephes, expf).
inline Lanes exponential(Lanes x) {
    x = x < -87.3f ? all(-87.3f) : x;
    x = x > 88.3f ? all(88.3f) : x;
    Lanes shift = all(12582912.0f);  // 1.5 · 2^23: what is added to it is rounded to a whole number
    Lanes whole = (x * 1.44269504f + shift) - shift;
    Lanes r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Lanes p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * as<Lanes>((__builtin_convertvector(whole, Integers) + 127) << 23);
}

constexpr int64_t LITTLE = 1 << 14;  // numbers up to which it takes longer to wake a thread than to do without

inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exponential(-x)); }

// The lanes from place i on of an array of n numbers; zeros behind its end.
template <typename T>
inline Lanes take(const T* from, int64_t i, int64_t n) {
    if (i + LANES <= n) return load(from + i);
    T last[LANES] = {};
    std::copy(from + i, from + n, last);
    return load(last);
}

template <typename T>
inline void give(Lanes x, T* to, int64_t i, int64_t n) {
    if (i + LANES <= n) return store(to + i, x);
    T last[LANES];
    store(last, x);
    std::copy(last, last + (n - i), to + i);
}

// ---------------------------------------------------------------------------------------------------------- attention

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// out[r][0..V·LANES) = Σ_k weights[r·row + k·step] · matrix[k][0..V·LANES), on top of what is there if `add`.
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

constexpr int QUERIES = 16;  // of a block
constexpr int HIGH = 4;      // rows of a product at a time
constexpr int WIDE = 2;      // lanes of a product at a time
constexpr int TILE = WIDE * LANES;

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

// One thread's room, cut into arrays of floats that begin where lanes do.
class Room {
  public:
    explicit Room(int64_t floats) : start(static_cast<float*>(std::aligned_alloc(64, up_to(4 * floats, 64)))) {}
    ~Room() { std::free(start); }
    Room(const Room&) = delete;
    float* operator()(int64_t floats) {
        float* array = start + used;
        used += up_to(floats, LANES);
        return array;
    }

  private:
    float* start;
    int64_t used = 0;
};

// Tokens of one head, `stride` apart, as [room, wide], by `scale`: zeros beyond a token's width and the last token.
template <typename T>
void gather(
    const T* states, int64_t stride, int64_t tokens, int64_t width, float* to, int64_t wide, int64_t room, float scale
) {
    for (int64_t t = 0; t < room; t++)
        for (int64_t d = 0; d < wide; d += LANES)
            store(to + t * wide + d, t < tokens && d < width ? take(states + t * stride, d, width) * scale : Lanes{});
}

// The way back: `tokens` of [tokens, wide], by `scale`.
template <typename T>
void scatter(const float* from, int64_t wide, T* states, int64_t stride, int64_t tokens, int64_t width, float scale) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t d = 0; d < width; d += LANES)
            give(load(from + t * wide + d) * scale, states + t * stride, d, width);
}

// [rows, columns] to [columns, rows], where rows is a multiple of LANES.
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
    for (int64_t r0 = 0; r0 < rows; r0 += LANES)
        for (int64_t c = 0; c < columns; c++)
            for (int64_t r = r0; r < r0 + LANES; r++) to[c * rows + r] = from[r * columns + c];
}

// In place, of the first `count` scores; zeros behind them. Returns the logarithm of the sum of exponentials.
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

template <typename T>
struct Attention {
    const T *query, *key, *value;  // [N, heads, width], [N, groups, width], [N, groups, width]
    const int64_t* starts;         // [rows + 1], where each row begins
    int64_t rows, heads, groups, width;
    float scale;

    int64_t wide() const { return up_to(width, TILE); }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t r = 0; r < rows; r++) most = std::max(most, starts[r + 1] - starts[r]);
        return up_to(most, TILE);
    }

    // One group's keys or values of a row as [tokens, wide], and as [wide, tokens] unless `turned` is null.
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

// ------------------------------------------------------------------------------------------------- token by token

// weight · x / √(mean x² + ε) (Zhang & Sennrich 2019). Returns what x was multiplied by.
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

// Both halves of each head of a token against each other (Su et al. 2021). states: [heads, width]; angles: [width].
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

// states: [tokens, heads, width]; angles: [tokens, width].
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
                below = below < -87.3f ? all(-87.3f) : below;  // lest nothing be multiplied by infinity
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

// ----------------------------------------------------------------------------------------------------------- decoding

// Attention of one query to keys and values [tokens, wide], where wide is a multiple of TILE. weights: room for as many
// numbers as tokens, up to a multiple of LANES.
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

// Of the threads that call it together: attention of one new token a row to those that the row holds. query: [rows,
// heads, width], rows `query_row` apart; keys, values: [rows, groups, tokens, width], rows and groups `of_row` and
// `of_group` apart; seen: [rows, tokens].
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

// Products of R rows with LANES / R rows of a weight: out[r · LANES / R + n] = Σ_k x[r · inner + k] · weight[n][k].
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

// For each R rows that are left: their products with `outputs` rows of a weight, on top of what is there.
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

// Of the threads that call it together: out += x · weightᵀ for few rows. x: [rows, inner]; weight: [outer, inner];
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

// One layer's weights, [outputs, inputs], those of one input beside each other, and its keys and values. No bias and no
// norm of queries and keys where these are null.
template <typename T>
struct Layer {
    const T *norm, *inward, *bias, *query_norm, *key_norm, *outward, *norm_after, *up, *down;
    T *keys, *values;
};

// The layers of a Llama for one new token a row, whose keys and values are the last of `tokens` that the row holds.
template <typename T>
struct Stack {
    const Layer<T>* layers;
    int64_t count, rows, hidden, heads, groups, width, inner;
    const T *cosines, *sines;           // [rows, width]
    int64_t of_row, of_group, tokens;   // how far apart rows and groups of keys and values lie, and how many there are
    const int64_t* seen;                // [rows, tokens]
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

    // A row's new keys or values [groups, width], in their place.
    void hold(const float* states, T* row) const {
        for (int64_t g = 0; g < groups; g++)
            for (int64_t d = 0; d < width; d += LANES)
                give(take(states + g * width, d, width), row + g * of_group + (tokens - 1) * width, d, width);
    }
};

}  // namespace

// For each type of number, the functions above by names that C has.
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
