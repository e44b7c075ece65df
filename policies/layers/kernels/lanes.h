// Vectors of sixteen floats, loaded from and stored to float or bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
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

// The bits of a value as a type of the same size.
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
#ifdef __AVX512F__  // GCC compiles the portable line below to five instructions
    Integers wide = as<Integers>(_mm512_cvtepu16_epi32(as<__m256i>(bits)));
#else
    Integers wide = __builtin_convertvector(bits, Integers);
#endif
    return as<Lanes>(wide << 16);
}

inline void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

// Rounded to nearest, ties to even; a NaN stays a NaN. Where the processor has the instruction, denormals become 0.
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

inline Lanes broadcast(float x) { return x - Lanes{}; }
inline Integers broadcast(int32_t x) { return x - Integers{}; }

// All lanes combined by `combine`, half with half until one remains.
template <typename Combine>
inline float reduce(Lanes x, Combine combine) {
    float part[LANES];
    store(part, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) part[i] = combine(part[i], part[i + half]);
    return part[0];
}

inline float sum(Lanes x) {
    return reduce(x, [](float a, float b) { return a + b; });
}

inline float maximum(Lanes x) {
    return reduce(x, [](float a, float b) { return a > b ? a : b; });
}

// Sums of lanes that are DISTANCE apart: those of `one` in the lower half of each 2·DISTANCE lanes, of `other` above.
template <int DISTANCE>
inline Lanes fold(Lanes one, Lanes other) {
    Integers lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Integers near = lane + ((lane & DISTANCE) / DISTANCE) * (LANES - DISTANCE), far = near + DISTANCE;
    return __builtin_shuffle(one, other, near) + __builtin_shuffle(one, other, far);
}

// Lane i is the sum of vector i of LANES vectors, which are overwritten.
inline Lanes sums(Lanes* x) {
    for (int i = 0; i < 8; i++) x[i] = fold<8>(x[i], x[i + 8]);
    for (int i = 0; i < 4; i++) x[i] = fold<4>(x[i], x[i + 4]);
    for (int i = 0; i < 2; i++) x[i] = fold<2>(x[i], x[i + 2]);
    return fold<1>(x[0], x[1]);
}

// The first `count` lanes; the rest are `other`.
inline Lanes first(int64_t count, Lanes x, float other) {
    const Integers lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < broadcast(int32_t(std::min<int64_t>(count, LANES))) ? x : broadcast(other);
}

constexpr float MIN_EXPONENT = -87.3f;  // e^MIN_EXPONENT is about the smallest normal number

// e^x, accurate to about one unit in the last place, between the smallest and the largest normal number, as
// 2^n · e^r with x = n ln 2 + r; e^r is a polynomial in r (Cephes, expf).
inline Lanes exponential(Lanes x) {
    x = x < MIN_EXPONENT ? broadcast(MIN_EXPONENT) : x;
    x = x > 88.3f ? broadcast(88.3f) : x;
    Lanes shift = broadcast(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    Lanes n = (x * 1.44269504f + shift) - shift;
    Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * as<Lanes>((__builtin_convertvector(n, Integers) + 127) << 23);
}

constexpr int64_t SERIAL_SIZE = 1 << 14;  // up to so many numbers, waking other threads costs more than it saves

inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exponential(-x)); }

// The lanes from index i of an array of n numbers; zeros beyond its end.
template <typename T>
inline Lanes load_part(const T* from, int64_t i, int64_t n) {
    if (i + LANES <= n) return load(from + i);
    T last[LANES] = {};
    std::copy(from + i, from + n, last);
    return load(last);
}

// Stores the lanes at index i of an array of n numbers, and nothing beyond its end.
template <typename T>
inline void store_part(Lanes x, T* to, int64_t i, int64_t n) {
    if (i + LANES <= n) return store(to + i, x);
    T last[LANES];
    store(last, x);
    std::copy(last, last + (n - i), to + i);
}

}  // namespace
