// The two block loops of whitening, written once for every instruction set (simd.h): values widen to float64.
#include "simd.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

// Passed by address, for compilers warn of values wider than a register.
typedef double WideDoubles __attribute__((vector_size(sizeof(double) * kWidth)));
typedef int64_t WideLongs __attribute__((vector_size(sizeof(int64_t) * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

struct OfFloats {
    typedef float Value;
    typedef Floats Values;
    typedef Ints Choices;
};
struct OfDoubles {
    typedef double Value;
    typedef WideDoubles Values;
    typedef WideLongs Choices;
};

// The first n of kWidth elements, the others 0.
template <typename Of>
inline void load_values(const typename Of::Value* x, int64_t n, typename Of::Values* out) {
    *out = typename Of::Values{};
    memcpy(out, x, n == kWidth ? sizeof(*out) : n * sizeof(*x));
}

// Bytes as integers that are 0 where the byte is; the compiler's own conversion takes them one by one.
inline Ints spread(const Bytes& bytes) {
#if SIMD_WIDTH == 16
    return (Ints)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif SIMD_WIDTH == 8
    return (Ints)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, (int64_t)bytes));
#else
    int32_t word;
    memcpy(&word, &bytes, sizeof(word));
    return (word - Ints{}) & Ints{0xff, 0xff00, 0xff0000, ~0xffffff};
#endif
}
inline void to_choices(const Ints& x, Ints* out) { *out = x != 0; }
inline void to_choices(const Ints& x, WideLongs* out) { *out = __builtin_convertvector(x != 0, WideLongs); }

// All bits where one of the first n elements counts.
template <typename Of, bool masked>
inline void choose(const uint8_t* mask, int64_t at, int64_t n, typename Of::Choices* out) {
    Bytes bytes{};
    if (masked) {
        memcpy(&bytes, mask + at, n == kWidth ? sizeof(bytes) : n);
    } else if (n == kWidth) {
        *out = ~typename Of::Choices{};
        return;
    } else {
        memset(&bytes, 1, n);
    }
    to_choices(spread(bytes), out);
}

// Moments of a block, from distances to its first element: sum of squares and squared sum then cancel no more than the
// logarithm of the block's length in bits (the first element is the far one), and a constant gives exactly 0. What lies
// under the mask may be NaN: it is replaced by that element, at no distance.
template <typename Of, bool masked>
void block_moments(const typename Of::Value* x, const uint8_t* mask, int64_t n, double* count, double* mean,
                   double* square) {
    *count = *mean = *square = 0;
    int64_t first = 0;
    if (masked) {
        while (first < n && !mask[first]) ++first;
    }
    if (first == n) return;
    typename Of::Values origins{};
    origins = origins + x[first];
    const double origin = x[first];
    WideDoubles sum{}, squares{};
    typename Of::Choices number{};
    const auto add = [&](int64_t at, int64_t width) {
        typename Of::Values values;
        typename Of::Choices choices;
        load_values<Of>(x + at, width, &values);
        choose<Of, masked>(mask, at, width, &choices);
        values = choices ? values : origins;
        const WideDoubles d = __builtin_convertvector(values, WideDoubles) - origin;
        sum += d;
        squares += d * d;
        number -= choices;
    };
    int64_t at = first;
    for (; at + kWidth <= n; at += kWidth) add(at, kWidth);
    if (at < n) add(at, n - at);
    double total = 0, all = 0;
    for (int i = 0; i < kWidth; ++i) {
        total += sum[i];
        all += squares[i];
        *count += static_cast<double>(number[i]);
    }
    const double distances = all - total * (total / *count);
    *mean = origin + total / *count;
    *square = distances < 0 ? 0 : distances;  // rounding may leave less than nothing
}

template <typename Of, bool masked>
void scale_block(const typename Of::Value* x, const uint8_t* mask, int64_t n, double mean, double factor, double back,
                 typename Of::Value* out) {
    const auto scale = [&](int64_t at, int64_t width) {
        typename Of::Values values;
        typename Of::Choices choices;
        load_values<Of>(x + at, width, &values);
        choose<Of, masked>(mask, at, width, &choices);
        const WideDoubles scaled = (__builtin_convertvector(values, WideDoubles) - mean) * factor + back;
        values = choices ? __builtin_convertvector(scaled, typename Of::Values) : typename Of::Values{};
        memcpy(out + at, &values, width == kWidth ? sizeof(values) : width * sizeof(*out));
    };
    int64_t at = 0;
    for (; at + kWidth <= n; at += kWidth) scale(at, kWidth);
    if (at < n) scale(at, n - at);
}

void moments_f32(const float* x, const uint8_t* mask, int64_t n, double* count, double* mean, double* square) {
    mask ? block_moments<OfFloats, true>(x, mask, n, count, mean, square)
         : block_moments<OfFloats, false>(x, mask, n, count, mean, square);
}
void moments_f64(const double* x, const uint8_t* mask, int64_t n, double* count, double* mean, double* square) {
    mask ? block_moments<OfDoubles, true>(x, mask, n, count, mean, square)
         : block_moments<OfDoubles, false>(x, mask, n, count, mean, square);
}
void scale_f32(const float* x, const uint8_t* mask, int64_t n, double mean, double factor, double back, float* out) {
    mask ? scale_block<OfFloats, true>(x, mask, n, mean, factor, back, out)
         : scale_block<OfFloats, false>(x, mask, n, mean, factor, back, out);
}
void scale_f64(const double* x, const uint8_t* mask, int64_t n, double mean, double factor, double back, double* out) {
    mask ? scale_block<OfDoubles, true>(x, mask, n, mean, factor, back, out)
         : scale_block<OfDoubles, false>(x, mask, n, mean, factor, back, out);
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
