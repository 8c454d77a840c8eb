// The loops over rows of swav.cpp, written once for every instruction set (simd.h).
#include "simd.h"
#include "swav.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

constexpr float kNowhere = -1e37f;  // stands for minus infinity in padding: products with 0 stay 0

// z = score * scale + v, and the padding behind it; returns the largest.
inline float scaled_row(const float* score, int64_t count, float scale, const float* v, float* z) {
    const int64_t padded = swav_padded(count);
    int64_t k = 0;
    for (; k + kWidth <= count; k += kWidth) {
        Floats x = load(score + k) * splat(scale);
        if (v) x += load(v + k);
        store(z + k, x);
    }
    for (; k < count; ++k) z[k] = v ? score[k] * scale + v[k] : score[k] * scale;
    for (; k < padded; ++k) z[k] = kNowhere;
    Floats largest = load(z);
    for (k = kWidth; k < padded; k += kWidth) largest = larger(largest, load(z + k));
    return horizontal_max(largest);
}

// e = exp(z - max); returns the sum. `e` may be `z`.
inline float exponentials(const float* z, int64_t count, float max, float* e) {
    Floats sum{};
    for (int64_t k = 0; k < swav_padded(count); k += kWidth) {
        const Floats y = exp_nonpositive(load(z + k) - splat(max));
        store(e + k, y);
        sum += y;
    }
    return horizontal_sum(sum);
}

// Rows [begin, end) of one view: largest [padded] and sum [padded] of exp(score / epsilon + u) by prototype; `scratch`
// holds 2 padded rows.
void swav_columns(const Swav& call, int64_t view, int64_t begin, int64_t end, float* largest, float* sum,
                  float* scratch) {
    const int64_t count = call.prototypes, padded = swav_padded(count);
    const float scale = float(call.inverse_epsilon);
    const float* v = call.potential ? call.potential + view * count : nullptr;
    float *z = scratch, *e = scratch + padded;
    for (int64_t k = 0; k < padded; ++k) {
        largest[k] = kNowhere;
        sum[k] = 0.0f;
    }
    for (int64_t i = begin; i < end; ++i) {
        const float* score = call.scores + (view * call.rows + i) * count;
        float u = 0.0f;
        if (v) {
            const float max = scaled_row(score, count, scale, v, z);
            u = -(max + float(log(double(exponentials(z, count, max, e)))));
        }
        scaled_row(score, count, scale, nullptr, z);
        for (int64_t k = 0; k < padded; k += kWidth) {
            const Floats y = load(z + k) + splat(u), before = load(largest + k);
            const Floats top = larger(y, before);
            store(sum + k, load(sum + k) * exp_nonpositive(before - top) + exp_nonpositive(y - top));
            store(largest + k, top);
        }
    }
}

// Rows [begin, end) of both views; returns their cross-entropies' sum. `scratch` holds 4 padded rows.
double swav_rows(const Swav& call, int64_t begin, int64_t end, float* scratch) {
    const int64_t count = call.prototypes, padded = swav_padded(count);
    const float sharpness = float(call.inverse_temperature);
    double loss = 0.0;
    for (int64_t i = begin; i < end; ++i) {
        float *q[2], *z[2], max[2], sum[2];
        for (int view = 0; view < 2; ++view) {
            const float* score = call.scores + (view * call.rows + i) * count;
            const float* v = call.potential ? call.potential + view * count : nullptr;
            q[view] = scratch + view * padded;
            z[view] = scratch + (2 + view) * padded;
            const float top = scaled_row(score, count, float(call.inverse_epsilon), v, q[view]);
            const Floats inverse = splat(1.0f / exponentials(q[view], count, top, q[view]));
            for (int64_t k = 0; k < padded; k += kWidth) store(q[view] + k, load(q[view] + k) * inverse);
            max[view] = scaled_row(score, count, sharpness, nullptr, z[view]);
        }
        for (int view = 0; view < 2; ++view) {
            const float* code = q[1 - view];  // the other view's code is what this one predicts
            const Floats top = splat(max[view]);
            Floats expected{};
            for (int64_t k = 0; k < padded; k += kWidth) expected += load(code + k) * (top - load(z[view] + k));
            sum[view] = exponentials(z[view], count, max[view], z[view]);
            loss += double(horizontal_sum(expected)) + log(double(sum[view]));
        }
        if (!call.gradient) continue;
        for (int view = 0; view < 2; ++view) {
            float* out = call.scores + (view * call.rows + i) * count;
            const Floats slope = splat(float(call.scale * call.inverse_temperature)), inverse = splat(1.0f / sum[view]);
            for (int64_t k = 0; k < padded; k += kWidth) {
                const Floats g = (load(z[view] + k) * inverse - load(q[1 - view] + k)) * slope;
                if (k + kWidth <= count) {
                    store(out + k, g);
                } else {
                    for (int64_t j = k; j < count; ++j) out[j] = g[j - k];
                }
            }
        }
    }
    return loss;
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
