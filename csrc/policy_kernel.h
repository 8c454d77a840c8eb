// The row kernel, written once for every instruction set (simd.h).
#include "halves.h"
#include "policy.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

constexpr int kBlock = 1024;  // floats held in the first cache between two passes over a block
static_assert(kBlock % kWidth == 0 && kept_floats(1) == kBlock + 1, "a block holds whole vectors");

// tanh, and its slope: from the exponential, for of 1 - tanh^2 rounding leaves nothing where tanh is near 1.
inline Floats tanh_of(Floats x, Floats* slope) {
    const Floats size = x < Floats{} ? -x : x;
    const Floats e = exp_nonpositive(splat(-2.0f) * size);
    const Floats inverse = splat(1.0f) / (splat(1.0f) + e);
    *slope = splat(4.0f) * e * inverse * inverse;
    const Floats far = (splat(1.0f) - e) / (splat(1.0f) + e);
    const Floats s = x * x;  // near 0 the quotient loses digits
    const Floats near = size * (splat(1.0f) + s * (splat(-1.0f / 3) + s * (splat(2.0f / 15) + s * splat(-17.0f / 315))));
    const Floats y = size < splat(0.15f) ? near : far;
    return x < Floats{} ? -y : y;
}

struct RowShape {
    float inverse_temperature;
    float softcap, inverse_softcap;
};

// z of one block of logits, written to `z`, and the largest by lane; elements past `count` are filled. With a softcap
// `slopes` gets the slope of each z by its logit over the temperature, where it is not null.
template <typename T, bool kSoftcap>
inline Floats block_z(const T* logits, int64_t count, const RowShape& shape, float* z, float* slopes) {
    const Floats scale = splat(shape.inverse_temperature);
    Floats largest = splat(-__builtin_huge_valf());
    int64_t i = 0;
    auto put = [&](Floats x, int64_t at) {
        if (kSoftcap) {
            Floats slope;
            x = splat(shape.softcap) * tanh_of(x * splat(shape.inverse_softcap), &slope);
            if (slopes) store(slopes + at, slope);
        }
        x = x * scale;
        store(z + at, x);
        return x;
    };
    for (; i + kWidth <= count; i += kWidth) largest = larger(largest, put(load(logits + i), i));
    if (i < count) {
        float tail[kWidth];
        for (int j = 0; j < kWidth; ++j) tail[j] = i + j < count ? widen(logits[i + j]) : 0.0f;
        put(load(tail), i);
        // Fillers lie so far below the largest that their exp is 0; minus infinity would make 0 times infinity.
        float top = z[i];
        for (int k = 0; k < kWidth; ++k) top = largest[k] > top ? largest[k] : top;
        for (int64_t j = i; j < count; ++j) top = z[j] > top ? z[j] : top;
        // A hundred is nothing beside numbers from 2^31: there a millionth of them is as far.
        const float far = 100.0f + 1e-6f * (top < 0 ? -top : top);
        for (int64_t j = count; j < i + kWidth; ++j) z[j] = top - far;
        largest = larger(largest, load(z + i));
    }
    return largest;
}

struct RowStatistics {
    float max;        // of z
    double ones;      // how many z are the largest
    double rest;      // sum of exp(z - max) over the others: added to 1 in float32 it would lose what a peaked row is about
    double weighted;  // of exp(z - max) (z - max)
    float target;     // z of the target
};

// exp(z - peak) of a row, block by block: what the gradient can be scaled from. Made where a row is in the nearest
// caches, it is read there again, and no exponential is made twice.
struct KeptRow {
    float* values;  // blocks of kBlock
    float* peaks;   // [blocks] the largest z up to and with each block
};

template <typename T, bool kSoftcap, bool kKeep>
RowStatistics row_statistics(const T* logits, int64_t vocabulary, int64_t target, const RowShape& shape,
                             const KeptRow& kept) {
    alignas(64) float z[kBlock];
    RowStatistics statistics{-__builtin_huge_valf(), 0.0, 0.0, 0.0, 0.0f};
    bool first = true;
    for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
        const int64_t count = vocabulary - begin < kBlock ? vocabulary - begin : kBlock;
        const float largest = horizontal_max(block_z<T, kSoftcap>(logits + begin, count, shape, z, nullptr));
        if (target >= begin && target < begin + count) statistics.target = z[target - begin];
        if (first || largest > statistics.max) {
            if (!first) {
                const double step = double(statistics.max) - double(largest);
                const double factor = exp(step);
                const double sum = statistics.ones + statistics.rest;
                statistics.weighted = (statistics.weighted + sum * step) * factor;
                statistics.rest = sum * factor;
                statistics.ones = 0.0;
            }
            statistics.max = largest;
            first = false;
        }
        const Floats max = splat(statistics.max);
        float* const values = kKeep ? kept.values + begin : nullptr;
        if (kKeep) kept.peaks[begin / kBlock] = statistics.max;
        Floats sum0{}, sum1{}, weighted0{}, weighted1{};
        Ints ones{};  // comparisons are -1 where true
        const int64_t whole = (count + kWidth - 1) / kWidth * kWidth;
        int64_t i = 0;
        for (; i + 2 * kWidth <= whole; i += 2 * kWidth) {
            const Floats a = load(z + i) - max, b = load(z + i + kWidth) - max;
            const Ints top_a = a == Floats{}, top_b = b == Floats{};
            Floats ea = exp_nonpositive(a), eb = exp_nonpositive(b);
            if (kKeep) {
                store(values + i, ea);
                store(values + i + kWidth, eb);
            }
            ea = top_a ? Floats{} : ea;
            eb = top_b ? Floats{} : eb;
            ones -= top_a + top_b;
            sum0 += ea;
            sum1 += eb;
            weighted0 += ea * a;
            weighted1 += eb * b;
        }
        if (i < whole) {
            const Floats a = load(z + i) - max;
            const Ints top = a == Floats{};
            Floats ea = exp_nonpositive(a);
            if (kKeep) store(values + i, ea);
            ea = top ? Floats{} : ea;
            ones -= top;
            sum0 += ea;
            weighted0 += ea * a;
        }
        for (int k = 0; k < kWidth; ++k) statistics.ones += ones[k];
        statistics.rest += double(horizontal_sum(sum0 + sum1));
        statistics.weighted += double(horizontal_sum(weighted0 + weighted1));
    }
    return statistics;
}

// The target's own gradient, from its log-prob: 1 - p loses every digit where p rounds to 1. `target_z` is the very z
// that max and log_sum were made from: another rounding would swamp 1 - p. `slope`: of z by the logit.
template <bool kEntropy>
float target_gradient(double slope, float target_z, float max, float log_sum, float entropy, float c, float e) {
    const double logprob = double(target_z) - double(max) - double(log_sum);
    double g = -double(c) * expm1(logprob);
    if (kEntropy) g -= double(e) * exp(logprob) * (logprob + double(entropy));
    return float(g * slope);
}

// Gradient of c logprob with respect to the logits of one row, from what its statistics kept. The logits are not read.
template <typename G>
void row_gradient_of(const KeptRow& kept, G* gradient, int64_t vocabulary, int64_t target, const RowShape& shape,
                     const RowStatistics& s, float log_sum, float c) {
    for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
        const int64_t end = vocabulary - begin < kBlock ? vocabulary : begin + kBlock;
        const double share = exp(double(kept.peaks[begin / kBlock]) - double(s.max) - double(log_sum));
        const Floats factor = splat(float(-double(c) * double(shape.inverse_temperature) * share));
        int64_t i = begin;
        for (; i + kWidth <= end; i += kWidth) store(gradient + i, load(kept.values + i) * factor);
        for (; i < end; ++i) narrow(kept.values[i] * factor[0], gradient + i);
    }
    if (target < 0 || target >= vocabulary) return;
    narrow(target_gradient<false>(shape.inverse_temperature, s.target, s.max, log_sum, 0.0f, c, 0.0f), gradient + target);
}

// Gradient of c logprob + e entropy with respect to the logits of one row. `gradient` may be `logits`, also in a narrower
// type: a block is read whole before it is written, and what is written never lies ahead of what is read.
template <typename T, typename G, bool kSoftcap, bool kEntropy>
void row_gradient(const T* logits, G* gradient, int64_t vocabulary, int64_t target, const RowShape& shape, float max,
                  float log_sum, float entropy, float c, float e) {
    alignas(64) float z[kBlock], slopes[kSoftcap ? kBlock : 1];
    const Floats shift = splat(max), inverse_sum = splat(float(exp(-double(log_sum))));
    const Floats scale = splat(shape.inverse_temperature), minus_c = splat(-c), minus_e = splat(-e);
    const Floats centre = splat(entropy - log_sum);  // log p + H = (z - max) + centre
    const bool here = target >= 0 && target < vocabulary;
    float target_z = 0.0f;
    double target_slope = shape.inverse_temperature;
    for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
        const int64_t count = vocabulary - begin < kBlock ? vocabulary - begin : kBlock;
        block_z<T, kSoftcap>(logits + begin, count, shape, z, kSoftcap ? slopes : nullptr);
        if (target >= begin && target < begin + count) {
            target_z = z[target - begin];
            if (kSoftcap) target_slope *= slopes[target - begin];
        }
        for (int64_t i = 0; i < count; i += kWidth) {
            const Floats x = load(z + i), a = x - shift;
            const Floats p = exp_nonpositive(a) * inverse_sum;
            Floats g = minus_c * p;
            if (kEntropy) g += minus_e * p * (a + centre);
            g = g * scale;
            if (kSoftcap) g = g * load(slopes + i);
            if (i + kWidth <= count) {
                store(gradient + begin + i, g);
            } else {
                float tail[kWidth];
                store(tail, g);
                for (int64_t j = i; j < count; ++j) narrow(tail[j - i], gradient + begin + j);
            }
        }
    }
    if (here) {
        narrow(target_gradient<kEntropy>(target_slope, target_z, max, log_sum, entropy, c, e), gradient + target);
    }
}

inline double clamped(double x, double bound) { return x > bound ? bound : x < -bound ? -bound : x; }

// d KL term / d logprob, for a log-ratio to the old policy that is `inside` its clamp or held there.
inline double kl_slope(const PolicyTerms& t, double apart, double ratio, bool inside) {
    const bool held = fabs(apart) > t.log_ratio_clamp;
    apart = clamped(apart, t.log_ratio_clamp);
    if (t.kl_apart) {
        if (held) return 0.0;
        if (!t.kl_unbiased) return apart;
        return apart * (t.kl_ratio_max > 0 && ratio > t.kl_ratio_max ? t.kl_ratio_max : ratio);
    }
    double steep = 1.0, estimate = apart;
    switch (t.kl_estimator) {
        case 2: steep = apart; estimate = 0.5 * apart * apart; break;
        case 3: steep = -expm1(-apart); estimate = apart - steep; break;
        case 4: steep = apart > 0 ? 1.0 : apart < 0 ? -1.0 : 0.0; estimate = fabs(apart); break;
    }
    if (held) steep = 0.0;
    if (t.kl_clamp > 0 && fabs(estimate) > t.kl_clamp) {
        steep = 0.0;
        estimate = clamped(estimate, t.kl_clamp);
    }
    return t.kl_unbiased ? ratio * (steep + (inside ? estimate : 0.0)) : steep;
}

// d loss / d logprob and d loss / d entropy of row i, given its log-prob.
inline void coefficients(const PolicyTerms& t, int64_t i, double logprob, float* c, float* e) {
    const double weight = t.row_weight ? double(t.row_weight[i]) : 1.0;
    *e = 0.0f;
    if (t.kind[i] == Kind::rehearsal) {
        *c = float(-weight * t.rehearsal_scale);
        return;
    }
    const double scale = weight * t.policy_scale, advantage = t.advantage[i];
    const double log_ratio = t.old_logprob ? logprob - double(t.old_logprob[i]) : 0.0;
    const double ratio = exp(clamped(log_ratio, t.log_ratio_clamp));
    const bool inside = fabs(log_ratio) <= t.log_ratio_clamp;
    double slope = -advantage;
    if (t.objective == Objective::cispo) {
        const double low = 1.0 - t.clip_low, high = 1.0 + t.clip_high;
        slope *= ratio < low ? low : ratio > high ? high : ratio;
    } else if (t.objective == Objective::ppo) {
        bool free = inside;
        // In float32, as the reference compares: a ratio at an edge is on the same side for both.
        const float rounded = float(ratio);
        if (advantage > 0 && rounded > float(1.0 + t.clip_high)) free = false;
        if (advantage < 0 && rounded < float(1.0 - t.clip_low)) free = false;
        if (t.dual_clip > 0 && advantage < 0 && rounded > float(t.dual_clip)) free = false;
        slope = free ? slope * ratio : 0.0;
    }
    if (t.kl_coef != 0) slope += t.kl_coef * kl_slope(t, logprob - double(t.ref_logprob[i]), ratio, inside);
    *c = float(scale * slope);
    *e = float(-(t.entropy_scale > 0 ? t.entropy_scale : scale) * t.entropy_coef);
}

template <typename T, typename G, bool kSoftcap>
void run_row(const Rows& call, int64_t i, const KeptRow& kept) {
    const int64_t at = call.row ? call.row[i] : i;
    const T* logits = static_cast<const T*>(call.logits) + at * call.logits_stride;
    G* gradient = call.gradient ? static_cast<G*>(call.gradient) + at * call.gradient_stride : nullptr;
    const float inverse_temperature =
        call.inverse_temperature ? call.inverse_temperature[i] : call.inverse_temperature_of_all;
    const RowShape shape{inverse_temperature, call.softcap, kSoftcap ? 1.0f / call.softcap : 0.0f};
    const int64_t target = call.target[i];
    if (call.mode != RowsMode::given) {
        // Of a soft cap, and of an entropy term, the gradient asks for z itself.
        const bool keep = !kSoftcap && call.mode == RowsMode::policy && call.entropy_coef == 0;
        const RowStatistics s =
            keep ? row_statistics<T, kSoftcap, !kSoftcap>(logits, call.vocabulary, target, shape, kept)
                 : row_statistics<T, kSoftcap, false>(logits, call.vocabulary, target, shape, kept);
        const bool here = target >= 0 && target < call.vocabulary;
        const double log_sum = log1p(s.rest + (s.ones - 1.0)), apart = double(s.target) - double(s.max);
        const double mean = s.weighted / (s.ones + s.rest);
        const float logprob = here ? float(apart - log_sum) : 0.0f;
        call.logprob[i] = logprob;
        call.entropy[i] = float(log_sum - mean);
        call.max[i] = s.max;
        call.log_sum[i] = float(log_sum);
        if (call.weighted) call.weighted[i] = float(mean);
        if (call.target_logit) call.target_logit[i] = here ? float(apart) : 0.0f;
        if (call.mode == RowsMode::statistics) return;
        coefficients(call, i, double(logprob), call.coefficient + i, call.entropy_coefficient + i);
        if (call.coefficient[i] == 0.0f && call.entropy_coefficient[i] == 0.0f) {
            if (!call.kept) memset(gradient, 0, call.vocabulary * sizeof(G));
            return;
        }
        if (keep) {
            row_gradient_of(kept, gradient, call.vocabulary, target, shape, s, call.log_sum[i], call.coefficient[i]);
            return;
        }
    }
    const float c = call.coefficient[i], e = call.entropy_coefficient ? call.entropy_coefficient[i] : 0.0f;
    if (e != 0.0f) {
        row_gradient<T, G, kSoftcap, true>(logits, gradient, call.vocabulary, target, shape, call.max[i],
                                           call.log_sum[i], call.entropy[i], c, e);
    } else {
        row_gradient<T, G, kSoftcap, false>(logits, gradient, call.vocabulary, target, shape, call.max[i],
                                            call.log_sum[i], 0.0f, c, 0.0f);
    }
}

template <typename T, typename G>
void run_rows_of(const Rows& call, int64_t begin, int64_t end, float* scratch) {
    const KeptRow kept{scratch, scratch ? scratch + (call.vocabulary + kBlock - 1) / kBlock * kBlock : nullptr};
    for (int64_t i = begin; i < end; ++i) {
        call.softcap > 0 ? run_row<T, G, true>(call, i, kept) : run_row<T, G, false>(call, i, kept);
    }
}

void run_rows(const Rows& call, int64_t begin, int64_t end, float* scratch) {
    switch (call.type) {
        case LogitsType::bf16: run_rows_of<BFloat16, BFloat16>(call, begin, end, scratch); break;
        case LogitsType::f16: run_rows_of<Float16, Float16>(call, begin, end, scratch); break;
        case LogitsType::f32:
            switch (call.gradient_type) {
                case LogitsType::f32: run_rows_of<float, float>(call, begin, end, scratch); break;
                case LogitsType::bf16: run_rows_of<float, BFloat16>(call, begin, end, scratch); break;
                case LogitsType::f16: run_rows_of<float, Float16>(call, begin, end, scratch); break;
            }
    }
}

inline Floats size_of(Floats x) { return x < Floats{} ? -x : x; }

// Columns [begin, end); `end - begin` is at most kBlock.
template <typename T>
void peaks_of(const Columns& call, int64_t begin, int64_t end) {
    alignas(64) float peak[kBlock];
    for (int64_t j = 0; j < end - begin; ++j) peak[j] = 0.0f;
    for (int64_t i = 0; i < call.count; ++i) {
        const T* row = static_cast<const T*>(call.gradient) + call.rows[i] * call.stride + begin;
        const Floats scale = splat(call.inverse_scale[i]);
        int64_t j = 0;
        for (; j + kWidth <= end - begin; j += kWidth) {
            store(peak + j, larger(load(peak + j), size_of(load(row + j)) * scale));
        }
        for (; j < end - begin; ++j) {
            const float share = (widen(row[j]) < 0 ? -widen(row[j]) : widen(row[j])) * call.inverse_scale[i];
            peak[j] = share > peak[j] ? share : peak[j];
        }
    }
    memcpy(call.peaks + begin, peak, (end - begin) * sizeof(float));
}

template <typename T>
void masses_of(const Columns& call, int64_t i) {
    const T* row = static_cast<const T*>(call.gradient) + call.rows[i] * call.stride;
    double total[kMaxThresholds] = {};
    for (int64_t begin = 0; begin < call.vocabulary; begin += kBlock) {
        const int64_t end = begin + kBlock < call.vocabulary ? begin + kBlock : call.vocabulary;
        Floats sum[kMaxThresholds] = {};
        int64_t j = begin;
        for (; j + kWidth <= end; j += kWidth) {
            const Floats peak = load(call.peaks + j), share = size_of(load(row + j));
            for (int t = 0; t < call.num_thresholds; ++t) sum[t] += peak < splat(call.thresholds[t]) ? share : Floats{};
        }
        for (int t = 0; t < call.num_thresholds; ++t) total[t] += double(horizontal_sum(sum[t]));
        for (; j < end; ++j) {
            const float x = widen(row[j]);
            for (int t = 0; t < call.num_thresholds; ++t) {
                if (call.peaks[j] < call.thresholds[t]) total[t] += x < 0 ? -x : x;
            }
        }
    }
    for (int t = 0; t < call.num_thresholds; ++t) {
        call.masses[i * call.num_thresholds + t] = float(total[t] * double(call.inverse_scale[i]));
    }
}

void run_peaks(const Columns& call, int64_t begin, int64_t end) {
    switch (call.type) {
        case LogitsType::f32: peaks_of<float>(call, begin, end); break;
        case LogitsType::bf16: peaks_of<BFloat16>(call, begin, end); break;
        case LogitsType::f16: peaks_of<Float16>(call, begin, end); break;
    }
}

void run_masses(const Columns& call, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        switch (call.type) {
            case LogitsType::f32: masses_of<float>(call, i); break;
            case LogitsType::bf16: masses_of<BFloat16>(call, i); break;
            case LogitsType::f16: masses_of<Float16>(call, i); break;
        }
    }
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
