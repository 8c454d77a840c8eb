// Vectors of floats on the compiler's vector types, for the kernels that are compiled once for each instruction set. A
// translation unit that includes this file has chosen an instruction set by pragma and defines SIMD_NAMESPACE and
// SIMD_WIDTH (float lanes).
//
// No standard-library templates in here or in what includes it: compiled for one instruction set, they could be merged
// by the linker with those of another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

constexpr int kWidth = SIMD_WIDTH;

typedef float Floats __attribute__((vector_size(sizeof(float) * kWidth)));
typedef int32_t Ints __attribute__((vector_size(sizeof(int32_t) * kWidth)));

inline Floats splat(float x) { return x - Floats{}; }
inline Ints bits(Floats x) { return (Ints)x; }  // vector casts keep the bits
inline Floats from_bits(Ints x) { return (Floats)x; }
inline Floats load(const float* p) {
    Floats x;
    memcpy(&x, p, sizeof(x));
    return x;
}
inline void store(float* p, Floats x) { memcpy(p, &x, sizeof(x)); }
// Half as many doubles, in as many bytes: wider vectors live in memory.
constexpr int kHalf = kWidth / 2;
typedef float HalfFloats __attribute__((vector_size(sizeof(float) * kHalf)));
typedef double Doubles __attribute__((vector_size(sizeof(double) * kHalf)));
typedef int64_t Longs __attribute__((vector_size(sizeof(int64_t) * kHalf)));

inline Doubles load_wide(const float* p) {
    HalfFloats x;
    memcpy(&x, p, sizeof(x));
    return __builtin_convertvector(x, Doubles);
}
inline Doubles load_wide(const double* p) {
    Doubles x;
    memcpy(&x, p, sizeof(x));
    return x;
}
inline void store_wide(float* p, Doubles x) {
    const HalfFloats y = __builtin_convertvector(x, HalfFloats);
    memcpy(p, &y, sizeof(y));
}
inline void store_wide(double* p, Doubles x) { memcpy(p, &x, sizeof(x)); }
inline double total(Doubles x) {
    double y = x[0];
    for (int i = 1; i < kHalf; ++i) y += x[i];
    return y;
}

// The second operand wins where one is NaN.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// exp(x) = p 2^n with p near 1, to about one unit in the last place, for x in the range that n can stand for.
struct Exponential {
    Floats p;
    Ints n;
};
inline Exponential exponential(Floats x) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Floats shifted = x * splat(1.44269504088896341f) + magic;
    const Floats n = shifted - magic;
    Floats r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    Floats p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * (r * r) + r + splat(1.0f);
    return {p, bits(shifted) - bits(magic)};
}

// exp(x) for x <= 0 (and a little above); 0 below -87.3; NaN stays NaN.
inline Floats exp_nonpositive(Floats x) {
    const Ints flushed = x < splat(-87.3f);
    const Exponential e = exponential(x);
    const Floats y = from_bits(bits(e.p) + (e.n << 23));
    return flushed ? Floats{} : y;
}

// exp(x) for |x| up to 170: infinite from 88.73 on, 0 below -87.3. (2^n is made for n up to 255.)
inline Floats exp_of(Floats x) {
    const Exponential e = exponential(x);
    const Ints half = e.n >> 1;  // 2^n in two factors, for n runs beyond the exponents of one
    const Floats y = e.p * from_bits((half + 127) << 23) * from_bits((e.n - half + 127) << 23);
    return x < splat(-87.3f) ? Floats{} : y;
}

// Whether a comparison holds in some lane.
inline bool any(const Ints& holds) {
#if SIMD_WIDTH == 16
    return _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds) != 0;
#elif SIMD_WIDTH == 8
    return _mm256_movemask_epi8((__m256i)holds) != 0;
#else
    return (holds[0] | holds[1] | holds[2] | holds[3]) != 0;
#endif
}

// By halves: lane after lane, each step would wait for the one before.
inline float horizontal_max(Floats x) {
#if SIMD_WIDTH == 16
    return _mm512_reduce_max_ps((__m512)x);
#elif SIMD_WIDTH == 8
    __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
#else
    const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
#endif
}
inline int32_t horizontal_min(Ints x) {
#if SIMD_WIDTH == 16
    return _mm512_reduce_min_epi32((__m512i)x);
#elif SIMD_WIDTH == 8
    __m128i y = _mm_min_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    y = _mm_min_epi32(y, _mm_unpackhi_epi64(y, y));
    return _mm_cvtsi128_si32(_mm_min_epi32(y, _mm_shuffle_epi32(y, 1)));
#else
    const int32_t a = x[0] < x[2] ? x[0] : x[2], b = x[1] < x[3] ? x[1] : x[3];
    return a < b ? a : b;
#endif
}
inline float horizontal_sum(Floats x) {
#if SIMD_WIDTH == 16
    return _mm512_reduce_add_ps((__m512)x);
#elif SIMD_WIDTH == 8
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// The first n of a vector's lanes from and to memory, 0 < n < kWidth; the others are `rest`, and are not stored.
inline Floats load_part(const float* from, int64_t n, float rest) {
#if SIMD_WIDTH == 16
    return (Floats)_mm512_mask_loadu_ps((__m512)splat(rest), (__mmask16)((1u << n) - 1), from);
#else
    Floats x = splat(rest);
    for (int64_t i = 0; i < n; ++i) x[i] = from[i];
    return x;
#endif
}
inline void store_part(float* to, Floats x, int64_t n) {
#if SIMD_WIDTH == 16
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), (__m512)x);
#else
    for (int64_t i = 0; i < n; ++i) to[i] = x[i];
#endif
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
