// 16-bit numbers of both kinds, one by one and in vectors, for the kernels of every instruction set (simd.h).
#pragma once

#include "simd.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

struct BFloat16 {
    uint16_t raw;
};
struct Float16 {
    uint16_t raw;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
    const uint32_t raw = uint32_t(x.raw) << 16;
    float y;
    memcpy(&y, &raw, 4);
    return y;
}
inline float widen(Float16 x) {
    const uint32_t sign = uint32_t(x.raw & 0x8000) << 16;
    uint32_t rest = uint32_t(x.raw & 0x7fff) << 13;
    float y;
    memcpy(&y, &rest, 4);
    if ((x.raw & 0x7c00) == 0x7c00) {  // infinity or NaN
        rest |= 0x7f800000u;
    } else {
        y *= 5.192296858534828e+33f;  // 2^112: the exponent's bias, right for subnormals too
        memcpy(&rest, &y, 4);
    }
    rest |= sign;
    memcpy(&y, &rest, 4);
    return y;
}
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, BFloat16* out) {
    uint32_t raw;
    memcpy(&raw, &x, 4);
    if (x != x) {
        out->raw = 0x7fc0;
    } else {
        out->raw = uint16_t((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);  // to nearest, ties to even
    }
}
inline void narrow(float x, Float16* out) {
    uint32_t raw;
    memcpy(&raw, &x, 4);
    const uint16_t sign = uint16_t((raw >> 16) & 0x8000);
    float size = x < 0 ? -x : x;
    if (x != x) {
        out->raw = 0x7e00;
    } else if (size >= 65520.0f) {
        out->raw = uint16_t(sign | 0x7c00);
    } else if (size < 6.103515625e-5f) {  // subnormal: let float addition round at 2^-24
        size += 0.5f;
        memcpy(&raw, &size, 4);
        out->raw = uint16_t(sign | (raw - 0x3f000000u));
    } else {
        memcpy(&raw, &size, 4);
        raw += 0xfff + ((raw >> 13) & 1);
        out->raw = uint16_t(sign | ((raw - (112u << 23)) >> 13));
    }
}

inline Floats load(const BFloat16* p) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
    Halves half;
    memcpy(&half, p, sizeof(half));
    return from_bits(__builtin_convertvector(half, Ints) << 16);
}
inline void store(BFloat16* p, Floats x) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
    typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
    const Words raw = (Words)x;
    const Words rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
    const Words number = (Words)(x == x);
    const Words value = (rounded & number) | (~number & (Words{} + 0x7fc0));
    const Halves half = __builtin_convertvector(value, Halves);
    memcpy(p, &half, sizeof(half));
}
#ifdef SIMD_F16C
inline Floats load(const Float16* p) {
    Floats x;
    for (int i = 0; i < kWidth; i += 8) {
        __m128i half;
        memcpy(&half, p + i, 16);
        const __m256 wide = _mm256_cvtph_ps(half);
        memcpy(reinterpret_cast<float*>(&x) + i, &wide, 32);
    }
    return x;
}
inline void store(Float16* p, Floats x) {
    for (int i = 0; i < kWidth; i += 8) {
        __m256 wide;
        memcpy(&wide, reinterpret_cast<float*>(&x) + i, 32);
        const __m128i half = _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
        memcpy(p + i, &half, 16);
    }
}
#else
inline Floats load(const Float16* p) {
    Floats x;
    for (int i = 0; i < kWidth; ++i) x[i] = widen(p[i]);
    return x;
}
inline void store(Float16* p, Floats x) {
    for (int i = 0; i < kWidth; ++i) narrow(x[i], p + i);
}
#endif

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
