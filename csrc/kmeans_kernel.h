// The loops of k-means, written once for every instruction set (simd.h).
#include "simd.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

// The first of the largest scores[:] - half[:] of c; 0 where none is a number.
template <bool kLess>
inline int32_t nearest_of_row(const float* scores, const float* half, int64_t c) {
    // Each lane's largest and its place, then those of the lanes: no branch depends on the data.
    constexpr int32_t kNowhere = INT32_MAX;
    Floats top = splat(-INFINITY);
    Ints at, where = Ints{} + kNowhere;
    for (int lane = 0; lane < kWidth; ++lane) at[lane] = lane;
    const auto look = [&](Floats value) {
        where = value > top ? at : where;
        top = larger(value, top);
        at += kWidth;
    };
    int64_t k = 0;
    for (; k + kWidth <= c; k += kWidth) look(kLess ? load(scores + k) - load(half + k) : load(scores + k));
    if (k < c) {
        const Floats rest = load_part(scores + k, c - k, -INFINITY);
        look(kLess ? rest - load_part(half + k, c - k, 0.0f) : rest);
    }
    const int32_t place = horizontal_min(top == splat(horizontal_max(top)) ? where : Ints{} + kNowhere);
    return place == kNowhere ? 0 : place;
}

// labels[i]: the first of the largest scores[i, :] - half[:] of c; half may be null.
void nearest(const float* scores, const float* half, int64_t n, int64_t c, int32_t* labels) {
    for (int64_t i = 0; i < n; ++i) {
        const float* row = scores + i * c;
        labels[i] = half ? nearest_of_row<true>(row, half, c) : nearest_of_row<false>(row, half, c);
    }
}

// sum += weight x in float64; the products of two float32 numbers are exact there.
void add_row(const float* x, double weight, int64_t d, double* sum) {
    int64_t at = 0;
    for (; at + kHalf <= d; at += kHalf) store_wide(sum + at, load_wide(sum + at) + load_wide(x + at) * weight);
    for (; at < d; ++at) sum[at] += static_cast<double>(x[at]) * weight;
}

// out[i]: the squared distance of rows[i] scale[i] to the centroid of its label; no scale counts as 1, no labels as the
// only centroid. In float64, where neither the products nor the order of the sum can be told from the result.
void distances(const float* rows, const float* scale, const float* centroids, const int32_t* labels, int64_t n, int64_t d,
               float* out) {
    for (int64_t i = 0; i < n; ++i) {
        const float* row = rows + i * d;
        const float* centroid = centroids + (labels ? labels[i] * d : 0);
        const double factor = scale ? scale[i] : 1.0;
        Doubles even{}, odd{};
        int64_t at = 0;
        for (; at + 2 * kHalf <= d; at += 2 * kHalf) {
            const int64_t next = at + kHalf;
            const Doubles first = load_wide(row + at) * factor - load_wide(centroid + at);
            const Doubles second = load_wide(row + next) * factor - load_wide(centroid + next);
            even += first * first;
            odd += second * second;
        }
        double sum = total(even + odd);
        for (; at < d; ++at) {
            const double apart = row[at] * factor - centroid[at];
            sum += apart * apart;
        }
        out[i] = static_cast<float>(sum);
    }
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
