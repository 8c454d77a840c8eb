// Mean, spread and scaling of masked values, in float64.
#include <cmath>
#include <vector>

#include "parallel.h"
#include "sequence_ops.h"

namespace stable_rlhf {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int kWidth = 8;  // sums side by side, so that they make vectors: compilers may not reorder one sum

// Moments of a block, from distances to its first element: sum of squares and squared sum then cancel no more than
// log2(kBlock) bits in the worst case (the first element is the far one), and a constant gives exactly 0.
template <bool masked, typename T>
Moments block_moments(const T* x, const uint8_t* mask, int64_t n) {
    int64_t first = 0;
    if (masked) {
        while (first < n && !mask[first]) ++first;
    }
    if (first == n) return {0, 0, 0};
    const T origin = x[first];
    double sum[kWidth] = {}, square[kWidth] = {};
    int32_t count[kWidth] = {};
    const auto add = [&](int64_t at, int j) {
        // A choice, not a product: what lies under the mask may be NaN.
        const T chosen = !masked || mask[at] ? x[at] : origin;
        const double d = static_cast<double>(chosen) - static_cast<double>(origin);
        sum[j] += d;
        square[j] += d * d;
        if (masked) count[j] += mask[at] != 0;
    };
    int64_t at = first;
    for (; at + kWidth <= n; at += kWidth) {
        for (int j = 0; j < kWidth; ++j) add(at + j, j);
    }
    for (int j = 0; at < n; ++at, ++j) add(at, j);
    double total = 0, squares = 0, number = masked ? 0 : static_cast<double>(n);
    for (int j = 0; j < kWidth; ++j) {
        total += sum[j];
        squares += square[j];
        if (masked) number += count[j];
    }
    const double square_sum = squares - total * (total / number);
    // Rounding may leave less than nothing.
    return {number, origin + total / number, square_sum < 0 ? 0 : square_sum};
}

template <bool masked, typename T>
void scale_block(const T* x, const uint8_t* mask, int64_t n, double mean, double factor, double back, T* out) {
    for (int64_t i = 0; i < n; ++i) {
        const T scaled = static_cast<T>((static_cast<double>(x[i]) - mean) * factor + back);
        out[i] = !masked || mask[i] ? scaled : T(0);
    }
}

}  // namespace

template <typename T>
Moments masked_moments(const T* x, const uint8_t* mask, int64_t n, int num_threads) {
    std::vector<Moments> parts((n + kBlock - 1) / kBlock);
    // Blocks are cut and merged the same way for any number of threads.
    parallel_for(static_cast<int64_t>(parts.size()), 8, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t b = from; b < to; ++b) {
            const int64_t at = b * kBlock, length = std::min(kBlock, n - at);
            parts[b] = mask ? block_moments<true>(x + at, mask + at, length)
                            : block_moments<false>(x + at, nullptr, length);
        }
    });
    Moments all{0, 0, 0};
    for (const Moments& part : parts) {  // Chan, Golub and LeVeque 1979
        if (part.count == 0) continue;
        const double count = all.count + part.count, distance = part.mean - all.mean;
        if (all.count == 0) {
            all = part;
            continue;
        }
        all.mean += distance * (part.count / count);
        all.square += part.square + distance * distance * (all.count * part.count / count);
        all.count = count;
    }
    return all;
}

template <typename T>
void masked_scale(const T* x, const uint8_t* mask, int64_t n, double mean, double variance, bool shift_mean,
                  int num_threads, T* out) {
    const double factor = 1.0 / std::sqrt(variance), back = shift_mean ? 0.0 : mean;
    parallel_for(n, 8 * kBlock, num_threads, [&](int64_t from, int64_t to) {
        if (mask) {
            scale_block<true>(x + from, mask + from, to - from, mean, factor, back, out + from);
        } else {
            scale_block<false>(x + from, mask, to - from, mean, factor, back, out + from);
        }
    });
}

template Moments masked_moments<float>(const float*, const uint8_t*, int64_t, int);
template Moments masked_moments<double>(const double*, const uint8_t*, int64_t, int);
template void masked_scale<float>(const float*, const uint8_t*, int64_t, double, double, bool, int, float*);
template void masked_scale<double>(const double*, const uint8_t*, int64_t, double, double, bool, int, double*);

}  // namespace stable_rlhf
