// The k3 estimator of token_rewards in float, written once for every instruction set (simd.h).
#include "simd.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

// kl[t] = exp(-d) - 1 + d; `kl` may be `d`.
void k3(const float* d, int64_t n, float* kl) {
    // 1/i!: with every term that counts for |x| < 1 (relative error below 1e-7).
    constexpr float inverse_factorial[] = {0,           1.0f,         1.0f / 2,      1.0f / 6,      1.0f / 24,
                                           1.0f / 120,  1.0f / 720,   1.0f / 5040,   1.0f / 40320,  1.0f / 362880,
                                           1.0f / 3628800, 1.0f / 39916800};
    constexpr int terms = 11, pair = 2;  // a pair of vectors, whose chains of operations overlap
    for (int64_t t = 0; t < n; t += pair * kWidth) {
        const int64_t left = n - t < pair * kWidth ? n - t : pair * kWidth;
        Floats x[pair]{}, y[pair];
        memcpy(x, d + t, sizeof(float) * left);
        // exp(x) - 1 - x near 0, where both subtractions cancel: the series.
        for (int i = 0; i < pair; ++i) {
            x[i] = -x[i];
            y[i] = x[i] * splat(inverse_factorial[terms]) + splat(inverse_factorial[terms - 1]);
        }
        for (int term = terms - 2; term > 1; --term) {
            for (int i = 0; i < pair; ++i) y[i] = y[i] * x[i] + splat(inverse_factorial[term]);
        }
        Ints beyond[pair], any{};
        for (int i = 0; i < pair; ++i) {
            y[i] = x[i] * x[i] * y[i];
            beyond[i] = (x[i] >= splat(1.0f)) | (x[i] <= splat(-1.0f));
            any |= beyond[i];
        }
        int32_t far = 0;
        for (int i = 0; i < kWidth; ++i) far |= any[i];
        if (far) {  // log-ratios are mostly small
            for (int i = 0; i < pair; ++i) {
                // Beyond 200 the exponential is infinite, or nothing beside -1 - x.
                Floats bounded = x[i] > splat(200.0f) ? splat(200.0f) : x[i];
                bounded = bounded < splat(-200.0f) ? splat(-200.0f) : bounded;
                const Floats away = exp_of(bounded) - splat(1.0f) - x[i];
                y[i] = beyond[i] ? away : y[i];
            }
        }
        memcpy(kl + t, y, sizeof(float) * left);
    }
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
