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

// A row's scores at [k, k + kWidth), -1 behind the last.
inline Floats scores_at(const float* score, int64_t k, int64_t count) {
    return k + kWidth <= count ? load(score + k) : load_part(score + k, count - k, -1.0f);
}

// Rows [begin, end) of one view: their masses, and the sum [padded] of these by prototype.
void swav_masses(const Swav& call, int64_t view, int64_t begin, int64_t end, float* sum) {
    const int64_t count = call.prototypes, padded = swav_padded(count);
    const float scale = float(call.inverse_epsilon);
    const Floats offset = splat(-kSwavBound * scale);
    for (int64_t k = 0; k < padded; ++k) sum[k] = 0.0f;
    for (int64_t i = begin; i < end; ++i) {
        const float* score = call.scores + (view * call.rows + i) * count;
        float* mass = call.mass + (view * call.rows + i) * padded;
        int64_t k = 0;
        for (; k < count; k += kWidth) {
            Floats e = exp_nonpositive(scores_at(score, k, count) * splat(scale) + offset);
            store(mass + k, e);
            if (k + kWidth > count) {
                e = load_part(mass + k, count - k, 0.0f);
                store(mass + k, e);
            }
            store(sum + k, load(sum + k) + e);
        }
        for (; k < padded; k += kWidth) store(mass + k, Floats{});
    }
}

// Rows [begin, end) of one view: the sum [padded] of their codes by prototype.
void swav_codes(const Swav& call, int64_t view, int64_t begin, int64_t end, float* sum) {
    constexpr int64_t kRows = 4;  // sums of rows wait for each other, and meet a prototype's sum together
    const int64_t padded = swav_padded(call.prototypes);
    const float* weights = call.weights + view * padded;
    for (int64_t k = 0; k < padded; ++k) sum[k] = 0.0f;
    for (int64_t i = begin; i < end; i += kRows) {
        const float* mass[kRows];
        float inverse[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
            mass[r] = call.mass + (view * call.rows + (i + r < end ? i + r : i)) * padded;
            Floats total{};
            for (int64_t k = 0; k < padded; k += kWidth) total += load(mass[r] + k) * load(weights + k);
            inverse[r] = i + r < end ? 1.0f / horizontal_sum(total) : 0.0f;
        }
        for (int64_t k = 0; k < padded; k += kWidth) {
            Floats total = load(sum + k);
            for (int64_t r = 0; r < kRows; ++r) total += load(mass[r] + k) * splat(inverse[r]);
            store(sum + k, total);
        }
    }
}

// `swav_rows` where codes are masses and exp(2 / temperature) is far inside of float32 too: no maximum is looked for.
double swav_rows_bounded(const Swav& call, int64_t begin, int64_t end, float* scratch) {
    const int64_t count = call.prototypes, padded = swav_padded(count), whole = count / kWidth * kWidth;
    const float sharpness = float(call.inverse_temperature);
    const Floats offset = splat(-kSwavBound * sharpness);
    const float slope = float(call.scale * call.inverse_temperature);
    double loss = 0.0;
    for (int64_t i = begin; i < end; ++i) {
        float *q[2], *p[2], of_code[2], of_p[2];
        for (int view = 0; view < 2; ++view) {
            const float* score = call.scores + (view * call.rows + i) * count;
            const float* mass = call.mass + (view * call.rows + i) * padded;
            const float* weights = call.weights + view * padded;
            q[view] = scratch + view * padded;
            p[view] = scratch + (2 + view) * padded;
            Floats codes{}, all{};
            for (int64_t k = 0; k < count; k += kWidth) {
                const Floats code = load(mass + k) * load(weights + k);
                Floats e = exp_nonpositive(scores_at(score, k, count) * splat(sharpness) + offset);
                store(q[view] + k, code);
                store(p[view] + k, e);
                if (k == whole) {  // nothing behind the last prototype
                    e = load_part(p[view] + k, count - k, 0.0f);
                    store(p[view] + k, e);
                }
                codes += code;
                all += e;
            }
            of_code[view] = 1.0f / horizontal_sum(codes);
            of_p[view] = horizontal_sum(all);
        }
        for (int view = 0; view < 2; ++view) {
            float* score = call.scores + (view * call.rows + i) * count;
            const float* code = q[1 - view];  // the other view's code is what this one predicts
            const Floats by_code = splat(of_code[1 - view]), by_p = splat(1.0f / of_p[view]), slopes = splat(slope);
            Floats expected{};
            for (int64_t k = 0; k < count; k += kWidth) {
                const Floats y = load(code + k) * by_code;
                expected += y * (scores_at(score, k, count) * splat(sharpness) + offset);
                if (!call.gradient) continue;
                const Floats g = (load(p[view] + k) * by_p - y) * slopes;
                if (k < whole) {
                    store(score + k, g);
                } else {
                    store_part(score + k, g, count - k);
                }
            }
            loss += log(double(of_p[view])) - double(horizontal_sum(expected));
        }
    }
    return loss;
}

// Rows [begin, end) of both views; returns their cross-entropies' sum. `scratch` holds 4 padded rows.
double swav_rows(const Swav& call, int64_t begin, int64_t end, float* scratch) {
    const int64_t count = call.prototypes, padded = swav_padded(count);
    const float sharpness = float(call.inverse_temperature);
    if (call.mass && 2.0 * call.inverse_temperature <= kSwavMostDigits) {
        return swav_rows_bounded(call, begin, end, scratch);
    }
    double loss = 0.0;
    for (int64_t i = begin; i < end; ++i) {
        float *q[2], *z[2], max[2], sum[2];
        for (int view = 0; view < 2; ++view) {
            const float* score = call.scores + (view * call.rows + i) * count;
            const float* v = call.potential ? call.potential + view * count : nullptr;
            q[view] = scratch + view * padded;
            z[view] = scratch + (2 + view) * padded;
            float total;
            if (call.mass) {
                const float* mass = call.mass + (view * call.rows + i) * padded;
                const float* weights = call.weights + view * padded;
                Floats sums{};
                for (int64_t k = 0; k < padded; k += kWidth) {
                    const Floats code = load(mass + k) * load(weights + k);
                    store(q[view] + k, code);
                    sums += code;
                }
                total = horizontal_sum(sums);
            } else {
                const float top = scaled_row(score, count, float(call.inverse_epsilon), v, q[view]);
                total = exponentials(q[view], count, top, q[view]);
            }
            const Floats inverse = splat(1.0f / total);
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
