// The two loops of advantage.cpp that are worth vectors, written once for every instruction set (simd.h).
#include "advantage.h"
#include "simd.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

inline void add(Doubles* sum, Floats x) {
    float lanes[kWidth];
    store(lanes, x);
    *sum += load_wide(lanes) + load_wide(lanes + kHalf);
}

// The sum of x[i] in double: four lines of the cache at a time, each in lanes of its own.
double sum(const float* x, int64_t n) {
    constexpr int kBlock = 64;
    Doubles part[4] = {};
    int64_t i = 0;
    for (; i + kBlock <= n; i += kBlock) {
        // Two KiB ahead, over the edge of a page, where the hardware stops.
        for (int j = 0; j < kBlock; j += 16) __builtin_prefetch(x + i + 512 + j);
        for (int j = 0; j < kBlock / kHalf; ++j) part[j % 4] += load_wide(x + i + j * kHalf);
    }
    for (; i + kHalf <= n; i += kHalf) part[0] += load_wide(x + i);
    double rest = 0;
    for (; i < n; ++i) rest += double(x[i]);
    return total((part[0] + part[1]) + (part[2] + part[3])) + rest;
}

// exp(x) to 1e-15 of itself for x up to 700; 0 below -700. The reduction is that of exponential() in simd.h.
inline Doubles exp_wide(Doubles x) {
    // |r| is at most 0.347: what is left out is below 4e-18.
    constexpr double kTaylor[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                  1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
                                  1.0 / 6,          1.0 / 2,         1.0,            1.0};
    const Doubles magic = 6755399441055744.0 - Doubles{};  // 1.5 * 2^52
    const Doubles shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
    const Doubles r = x - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;
    Doubles p = kTaylor[0] - Doubles{};
    for (int j = 1; j < 14; ++j) p = p * r + kTaylor[j];
    const Doubles power = (Doubles)((Longs)p + (((Longs)shifted - (Longs)magic) << 52));
    return x < -700.0 ? Doubles{} : power;
}

void exponentials(const double* x, int64_t n, double* out) {
    Doubles value{};
    int64_t i = 0;
    for (; i + kHalf <= n; i += kHalf) {
        memcpy(&value, x + i, sizeof(value));
        value = exp_wide(value);
        memcpy(out + i, &value, sizeof(value));
    }
    if (i == n) return;
    double rest[kHalf] = {};
    for (int j = 0; i + j < n; ++j) rest[j] = x[i + j];
    memcpy(&value, rest, sizeof(value));
    value = exp_wide(value);
    for (int j = 0; i + j < n; ++j) out[i + j] = value[j];
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
