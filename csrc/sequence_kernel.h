// The k3 estimator of token_rewards in float, written once for every instruction set (simd.h).
#include "simd.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

constexpr int kPair = 2;  // a pair of vectors, whose chains of operations overlap

// kl[t] = exp(-d) - 1 + d of one pair; `kl` may be `d`.
inline void k3_of_pair(const float* d, float* kl) {
    // 1/i!: with every term that counts for |x| < 1 (relative error below 1e-7).
    constexpr float inverse_factorial[] = {0,           1.0f,         1.0f / 2,      1.0f / 6,      1.0f / 24,
                                           1.0f / 120,  1.0f / 720,   1.0f / 5040,   1.0f / 40320,  1.0f / 362880,
                                           1.0f / 3628800, 1.0f / 39916800};
    constexpr int terms = 11;
    Floats x[kPair], y[kPair];
    // exp(x) - 1 - x near 0, where both subtractions cancel: the series.
    for (int i = 0; i < kPair; ++i) {
        x[i] = -load(d + i * kWidth);
        y[i] = x[i] * splat(inverse_factorial[terms]) + splat(inverse_factorial[terms - 1]);
    }
    for (int term = terms - 2; term > 1; --term) {
        for (int i = 0; i < kPair; ++i) y[i] = y[i] * x[i] + splat(inverse_factorial[term]);
    }
    Ints beyond[kPair], some{};
    for (int i = 0; i < kPair; ++i) {
        y[i] = x[i] * x[i] * y[i];
        beyond[i] = (x[i] >= splat(1.0f)) | (x[i] <= splat(-1.0f));
        some |= beyond[i];
    }
    if (any(some)) {  // log-ratios are mostly small
        for (int i = 0; i < kPair; ++i) {
            // Beyond 100 the exponential is infinite, or nothing beside -1 - x.
            Floats bounded = x[i] > splat(100.0f) ? splat(100.0f) : x[i];
            bounded = bounded < splat(-100.0f) ? splat(-100.0f) : bounded;
            const Floats away = exp_of(bounded) - splat(1.0f) - x[i];
            y[i] = beyond[i] ? away : y[i];
        }
    }
    for (int i = 0; i < kPair; ++i) store(kl + i * kWidth, y[i]);
}

void k3(const float* d, int64_t n, float* kl) {
    int64_t t = 0;
    for (; t + kPair * kWidth <= n; t += kPair * kWidth) k3_of_pair(d + t, kl + t);
    if (t == n) return;
    float rest[kPair * kWidth] = {};
    memcpy(rest, d + t, sizeof(float) * (n - t));
    k3_of_pair(rest, rest);
    memcpy(kl + t, rest, sizeof(float) * (n - t));
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
