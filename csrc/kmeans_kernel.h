// The two loops of k-means, written once for every instruction set (simd.h).
#include "simd.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

// labels[i]: the first of the largest scores[i, :] - half[:] of c; half may be null.
void nearest(const float* scores, const float* half, int64_t n, int64_t c, int32_t* labels) {
    for (int64_t i = 0; i < n; ++i) {
        const float* row = scores + i * c;
        // The largest first, its place then, from numbers that are in the nearest cache by now: two loops without a
        // dependence from element to element but the maximum's.
        float best = -INFINITY;
        int64_t at = 0;
        if (c >= kWidth) {
            Floats top = splat(-INFINITY);
            for (; at + kWidth <= c; at += kWidth) {
                top = larger(half ? load(row + at) - load(half + at) : load(row + at), top);
            }
            best = horizontal_max(top);
        }
        for (int64_t rest = at; rest < c; ++rest) {
            const float value = half ? row[rest] - half[rest] : row[rest];
            best = value > best ? value : best;
        }
        int64_t place = 0;
        const Floats wanted = splat(best);
        for (; place + kWidth <= c; place += kWidth) {
            const Ints equal = (half ? load(row + place) - load(half + place) : load(row + place)) == wanted;
            if (any(equal)) break;
        }
        while (place < c && (half ? row[place] - half[place] : row[place]) != best) ++place;
        labels[i] = place < c ? static_cast<int32_t>(place) : 0;  // no number at all
    }
}

// sum += weight x in float64; the products of two float32 numbers are exact there.
void add_row(const float* x, double weight, int64_t d, double* sum) {
    int64_t at = 0;
    for (; at + kHalf <= d; at += kHalf) store_wide(sum + at, load_wide(sum + at) + load_wide(x + at) * weight);
    for (; at < d; ++at) sum[at] += static_cast<double>(x[at]) * weight;
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
