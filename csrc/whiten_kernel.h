// The two block loops of whitening, written once for every instruction set (simd.h): values widen to float64.
#include "simd.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

// All bits where a value counts, from its byte; the compiler's own conversion takes bytes one by one.
inline Longs counted(const uint8_t* mask) {
#if SIMD_WIDTH == 16
    return (Longs)_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask))) != 0;
#elif SIMD_WIDTH == 8
    int32_t word;
    memcpy(&word, mask, sizeof(word));
    return (Longs)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(word)) != 0;
#else
    return Longs{mask[0], mask[1]} != 0;
#endif
}

// Moments of a block, from distances to its first element: sum of squares and squared sum then cancel no more than the
// logarithm of the block's length in bits (the first element is the far one), and a constant gives exactly 0. What lies
// under the mask may be NaN: it is replaced by that element, at no distance.
template <typename T, bool masked>
void block_moments(const T* x, const uint8_t* mask, int64_t n, double* count, double* mean, double* square) {
    *count = *mean = *square = 0;
    int64_t first = 0;
    if (masked) {
        while (first < n && !mask[first]) ++first;
    }
    if (first == n) return;
    constexpr int kChains = 4;  // a sum waits for the one before it, four do not for each other
    const double origin = x[first];
    Doubles sum[kChains] = {}, squares[kChains] = {};
    Longs number[kChains] = {};
    int64_t at = first;
    for (; at + kChains * kHalf <= n; at += kChains * kHalf) {
        for (int chain = 0; chain < kChains; ++chain) {
            Doubles d = load_wide(x + at + chain * kHalf) - origin;
            if (masked) {
                const Longs counts = counted(mask + at + chain * kHalf);
                d = counts ? d : Doubles{};
                number[chain] -= counts;
            }
            sum[chain] += d;
            squares[chain] += d * d;
        }
    }
    double all = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    double distances = total((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const Longs seen = (number[0] + number[1]) + (number[2] + number[3]);
    for (int i = 0; i < kHalf; ++i) *count += static_cast<double>(seen[i]);
    if (!masked) *count = static_cast<double>(at - first);
    for (; at < n; ++at) {
        if (masked && !mask[at]) continue;
        const double d = x[at] - origin;
        all += d;
        distances += d * d;
        *count += 1;
    }
    distances -= all * (all / *count);
    *mean = origin + all / *count;
    *square = distances < 0 ? 0 : distances;  // rounding may leave less than nothing
}

template <typename T, bool masked>
void scale_block(const T* x, const uint8_t* mask, int64_t n, double mean, double factor, double back, T* out) {
    int64_t at = 0;
    for (; at + kHalf <= n; at += kHalf) {
        Doubles scaled = (load_wide(x + at) - mean) * factor + back;
        if (masked) scaled = counted(mask + at) ? scaled : Doubles{};
        store_wide(out + at, scaled);
    }
    for (; at < n; ++at) out[at] = masked && !mask[at] ? T(0) : static_cast<T>((x[at] - mean) * factor + back);
}

void moments_f32(const float* x, const uint8_t* mask, int64_t n, double* count, double* mean, double* square) {
    mask ? block_moments<float, true>(x, mask, n, count, mean, square)
         : block_moments<float, false>(x, mask, n, count, mean, square);
}
void moments_f64(const double* x, const uint8_t* mask, int64_t n, double* count, double* mean, double* square) {
    mask ? block_moments<double, true>(x, mask, n, count, mean, square)
         : block_moments<double, false>(x, mask, n, count, mean, square);
}
void scale_f32(const float* x, const uint8_t* mask, int64_t n, double mean, double factor, double back, float* out) {
    mask ? scale_block<float, true>(x, mask, n, mean, factor, back, out)
         : scale_block<float, false>(x, mask, n, mean, factor, back, out);
}
void scale_f64(const double* x, const uint8_t* mask, int64_t n, double mean, double factor, double back, double* out) {
    mask ? scale_block<double, true>(x, mask, n, mean, factor, back, out)
         : scale_block<double, false>(x, mask, n, mean, factor, back, out);
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
