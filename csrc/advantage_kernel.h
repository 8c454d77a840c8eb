// The two loops of advantage.cpp that are worth vectors, written once for every instruction set (simd.h).
#include "advantage.h"
#include "simd.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

constexpr int kHalf = kWidth / 2;
typedef float HalfFloats __attribute__((vector_size(sizeof(float) * kHalf)));
typedef double Doubles __attribute__((vector_size(sizeof(double) * kHalf)));

inline Doubles load_wide(const float* p) {
    HalfFloats x;
    memcpy(&x, p, sizeof(x));
    return __builtin_convertvector(x, Doubles);
}
inline double total(Doubles x) {
    double y = x[0];
    for (int i = 1; i < kHalf; ++i) y += x[i];
    return y;
}

inline void add(Doubles* sum, Floats x) {
    float lanes[kWidth];
    store(lanes, x);
    *sum += load_wide(lanes) + load_wide(lanes + kHalf);
}

// sum of a[i] - b[i]: differences of floats, lanes of sixteen of them in float, and these sums in double.
double difference_sum(const float* a, const float* b, int64_t n) {
    Doubles sum{};
    int64_t i = 0;
    for (; i + 16 * kWidth <= n; i += 16 * kWidth) {
        // Two KiB ahead, over the edge of a page, where the hardware stops.
        for (int j = 0; j < 16 * kWidth; j += 16) __builtin_prefetch(b + i + 512 + j);
        Floats part[4] = {};
        for (int j = 0; j < 16; ++j) part[j % 4] += load(a + i + j * kWidth) - load(b + i + j * kWidth);
        add(&sum, (part[0] + part[1]) + (part[2] + part[3]));
    }
    Floats part{};
    for (; i + kWidth <= n; i += kWidth) part += load(a + i) - load(b + i);
    add(&sum, part);
    double rest = 0;
    for (; i < n; ++i) rest += double(a[i] - b[i]);
    return total(sum) + rest;
}

// -log sigma(x) = max(-x, 0) + log1p(exp(-|x|)) in its second part, and sigma on both sides.
struct LogSigmoid {
    Floats smooth;   // log1p(exp(-|x|)), the same for x and -x
    Floats falling;  // sigma(-x)
    Floats rising;   // sigma(x)
};
inline LogSigmoid log_sigmoid(Floats x) {
    const Floats size = x < Floats{} ? -x : x;
    const Floats e = exp_nonpositive(-size);
    const Floats one = splat(1.0f);
    // log1p(e) = 2 atanh(e / (2 + e)): the argument is at most 1/3, nine terms leave 1e-9 of the result. One division
    // serves both quotients.
    const Floats low = one + e, high = low + one, shared = one / (low * high), inverse = high * shared;
    const Floats s = e * low * shared, s2 = s * s;
    Floats p = splat(2.0f / 17);
    p = p * s2 + splat(2.0f / 15);
    p = p * s2 + splat(2.0f / 13);
    p = p * s2 + splat(2.0f / 11);
    p = p * s2 + splat(2.0f / 9);
    p = p * s2 + splat(2.0f / 7);
    p = p * s2 + splat(2.0f / 5);
    p = p * s2 + splat(2.0f / 3);
    p = p * s2 + splat(2.0f);
    const Ints negative = x < Floats{};
    return {p * s, negative ? inverse : e * inverse, negative ? e * inverse : inverse};
}
// max(x, 0), NaN where x is NaN.
inline Floats ramp(Floats x) { return x < Floats{} ? Floats{} : x; }

void pair_terms(const PairBlock<float>& block) {
    Doubles ranking{}, upper{}, lower{};
    Ints wins{}, past{};  // a true comparison is -1
    for (int64_t i = 0; i < block.count; i += kWidth) {
        const Floats c = load(block.chosen + i), r = load(block.rejected + i);
        const Floats alpha = load(block.smoothing + i), weight = load(block.weight + i);
        const Floats z = (c - r) - load(block.shift + i);
        const LogSigmoid at = log_sigmoid(z);
        wins -= (c > r) + (c > r) + (c == r);
        const Floats rest = splat(1.0f) - alpha;
        // By its two sides, so that neither a hard pair nor a smoothed easy one loses digits to the other.
        add(&ranking, weight * (at.smooth + rest * ramp(-z) + alpha * ramp(z)));
        Floats slope_c = alpha * at.rising - rest * at.falling, slope_r = -slope_c;
        if (block.upper) {
            const Floats above = load(block.upper + i) - c, below = load(block.lower + i) + r;
            const LogSigmoid high = log_sigmoid(above), low = log_sigmoid(below);
            add(&upper, weight * (high.smooth + ramp(-above)));
            add(&lower, weight * (low.smooth + ramp(-below)));
            slope_c = slope_c + high.falling;
            slope_r = slope_r - low.falling;
            past -= (above < Floats{}) + (below < Floats{});
        }
        store(block.chosen_slope + i, weight * slope_c);
        store(block.rejected_slope + i, weight * slope_r);
    }
    for (int i = 0; i < kWidth; ++i) {
        block.counts[0] += wins[i];
        block.counts[1] += past[i];
    }
    block.sums[0] += total(ranking);
    block.sums[1] += total(upper);
    block.sums[2] += total(lower);
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
