#include "advantage.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "fields.h"
#include "isa.h"
#include "parallel.h"

namespace stable_rlhf {
namespace {

template <typename T>
bool is_finite(T x) {
    return x - x == T(0);
}

// The same loops as in advantage_kernel.h, for double: precision matters more than speed there.
double sum(const double* x, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += x[i];
    return total;
}

struct LogSigmoid {
    double smooth, falling, rising;
};
LogSigmoid log_sigmoid(double x) {
    const double e = std::exp(-std::fabs(x)), inverse = 1 / (1 + e);
    return {std::log1p(e), x < 0 ? inverse : e * inverse, x < 0 ? e * inverse : inverse};
}
double ramp(double x) { return x < 0 ? 0 : x; }

void pair_terms(const PairBlock<double>& block) {
    for (int64_t i = 0; i < block.count; ++i) {
        const double c = block.chosen[i], r = block.rejected[i], alpha = block.smoothing[i], weight = block.weight[i];
        const double z = (c - r) - block.shift[i];
        block.counts[0] += 2 * (c > r) + (c == r);
        const LogSigmoid at = log_sigmoid(z);
        block.sums[0] += weight * (at.smooth + (1 - alpha) * ramp(-z) + alpha * ramp(z));
        double slope_c = alpha * at.rising - (1 - alpha) * at.falling, slope_r = -slope_c;
        if (block.upper) {
            const double above = block.upper[i] - c, below = block.lower[i] + r;
            const LogSigmoid high = log_sigmoid(above), low = log_sigmoid(below);
            block.sums[1] += weight * (high.smooth + ramp(-above));
            block.sums[2] += weight * (low.smooth + ramp(-below));
            slope_c += high.falling;
            slope_r -= low.falling;
            block.counts[1] += (above < 0) + (below < 0);
        }
        block.chosen_slope[i] = weight * slope_c;
        block.rejected_slope[i] = weight * slope_r;
    }
}

template <typename T>
double sum(const Kernels& kernels, const T* x, int64_t n) {
    if constexpr (std::is_same_v<T, float>) {
        return kernels.sum(x, n);
    } else {
        return sum(x, n);
    }
}
template <typename T>
void pair_terms(const Kernels& kernels, const PairBlock<T>& block) {
    if constexpr (std::is_same_v<T, float>) {
        kernels.pair_terms(block);
    } else {
        pair_terms(block);
    }
}

// log w [responses, K], clamped, and w: sums of log-ratios by response. False for a bad packing or a non-finite weight.
// A sum of log-ratios is the difference of two sums of log-probs, which are made in double and lose nothing by it: so
// each row is read once, from its beginning to its end, as memory is read fastest.
template <typename T>
bool weigh(const Advantage<T>& call, const Kernels& kernels, std::vector<double>* log_weight,
           std::vector<double>* weight) {
    const int64_t* bounds = call.cu_seqlens;
    const int64_t R = call.responses, K = call.alternates;
    if (bounds[0] != 0 || bounds[R] != call.tokens) return false;
    for (int64_t r = 0; r < R; ++r) {
        if (bounds[r] > bounds[r + 1]) return false;
    }
    log_weight->resize(R * K);
    weight->resize(R * K);
    // Work is shared out by tokens: runs of short responses, and pieces of long ones. Pieces start at the response's own
    // first token, so that a sum does not depend on what lies before it.
    constexpr int64_t kPiece = 32768, kRun = 1024;
    struct Item {
        int64_t first, last;  // responses
        int64_t begin, end;   // tokens
        int64_t partial;      // where the sums of a piece go; -1: whole responses
    };
    std::vector<Item> items;
    int64_t pieces = 0;
    for (int64_t r = 0; r < R;) {
        int64_t end = r + 1;
        if (bounds[end] - bounds[r] > kPiece) {
            for (int64_t t = bounds[r]; t < bounds[end]; t += kPiece) {
                items.push_back({r, end, t, std::min(t + kPiece, bounds[end]), pieces++});
            }
        } else {
            while (end < R && end - r < kRun && bounds[end + 1] - bounds[r] <= kPiece) ++end;
            items.push_back({r, end, 0, 0, -1});
        }
        r = end;
    }
    std::vector<double> partial(pieces * K);
    const auto finish = [&](int64_t r, int64_t k, double log_ratio) {
        if (call.length_normalized) log_ratio /= static_cast<double>(std::max<int64_t>(bounds[r + 1] - bounds[r], 1));
        // A clamp must not hide an infinite one.
        if (is_finite(log_ratio)) log_ratio = std::min(log_ratio, call.max_log_weight);
        (*log_weight)[r * K + k] = log_ratio;
    };
    const auto weigh_responses = [&](int64_t first, int64_t last) {
        kernels.exponentials(log_weight->data() + first * K, (last - first) * K, weight->data() + first * K);
    };
    // The sums of log-probs, whose cost is that of reading them.
    const double each = 0.5 * static_cast<double>(K + 1) * static_cast<double>(bounds[R] - bounds[0]) /
                        static_cast<double>(std::max<size_t>(items.size(), 1));
    parallel_for(static_cast<int64_t>(items.size()), 1, each, call.num_threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const Item& item = items[i];
            if (item.partial >= 0) {
                const int64_t n = item.end - item.begin;
                const double own = sum(kernels, call.logprob + item.begin, n);
                for (int64_t k = 0; k < K; ++k) {
                    const T* const alternate = call.alt_logprob + k * call.tokens;
                    partial[item.partial * K + k] = own - sum(kernels, alternate + item.begin, n);
                }
                continue;
            }
            double own[kRun];
            for (int64_t r = item.first; r < item.last; ++r) {
                own[r - item.first] = sum(kernels, call.logprob + bounds[r], bounds[r + 1] - bounds[r]);
            }
            for (int64_t k = 0; k < K; ++k) {
                const T* const alternate = call.alt_logprob + k * call.tokens;
                for (int64_t r = item.first; r < item.last; ++r) {
                    finish(r, k, own[r - item.first] - sum(kernels, alternate + bounds[r], bounds[r + 1] - bounds[r]));
                }
            }
            weigh_responses(item.first, item.last);
        }
    });
    for (size_t i = 0; i < items.size(); ++i) {
        if (items[i].partial < 0 || items[i].begin != bounds[items[i].first]) continue;
        for (int64_t k = 0; k < K; ++k) {
            double whole = 0;
            for (size_t j = i; j < items.size() && items[j].first == items[i].first; ++j) {
                whole += partial[items[j].partial * K + k];
            }
            finish(items[i].first, k, whole);
        }
        weigh_responses(items[i].first, items[i].last);
    }
    for (const double x : *log_weight) {
        if (!is_finite(x) || x > 80.0) return false;  // the weight, or the loss, would overflow in float32
    }
    return true;
}

// (sum w)^2 / sum w^2 over the responses, averaged over the alternates.
double effective_sample_size(const std::vector<double>& log_weight, const std::vector<double>& weight, int64_t R,
                             int64_t K) {
    std::vector<double> sums(2 * K);
    for (int64_t r = 0; r < R; ++r) {
        for (int64_t k = 0; k < K; ++k) {
            const double w = weight[r * K + k];
            sums[2 * k] += w;
            sums[2 * k + 1] += w * w;
        }
    }
    double mean = 0;
    for (int64_t k = 0; k < K; ++k) {
        double sum = sums[2 * k], squares = sums[2 * k + 1];
        if (R > 0 && !(squares > 1e-280)) {  // all of them underflow: relative to the largest
            double top = log_weight[k];
            for (int64_t r = 1; r < R; ++r) top = std::max(top, log_weight[r * K + k]);
            sum = squares = 0;
            for (int64_t r = 0; r < R; ++r) {
                const double w = std::exp(log_weight[r * K + k] - top);
                sum += w;
                squares += w * w;
            }
        }
        if (squares > 0) mean += sum * sum / squares / static_cast<double>(K);
    }
    return mean;
}

}  // namespace

template <typename T>
bool advantage(const Advantage<T>& call) {
    const Kernels& chosen_kernels = kernels(call.isa);
    const int64_t R = call.responses, K = call.alternates, M = std::max<int64_t>(call.pairs, 0);
    const double N = static_cast<double>(call.policies);
    const T share = static_cast<T>(static_cast<double>(call.policies - K) / N);

    std::vector<double> log_weight, weight;
    const bool weighed = call.logprob != nullptr && K > 0;
    if (weighed && !weigh(call, chosen_kernels, &log_weight, &weight)) return false;

    std::vector<int64_t> owners;
    const int64_t* prompt = call.prompt_rule == PromptRule::given ? call.prompt : nullptr;
    if (call.expected && call.prompt_rule == PromptRule::of_pairs) {  // every response has to be in one pair
        if (2 * M != R) return false;
        owners.assign(R, -1);
        for (int64_t i = 0; i < 2 * M; ++i) {
            const int64_t r = call.pair[i];
            if (r < 0 || r >= R || owners[r] >= 0) return false;
            owners[r] = i / 2;
        }
        prompt = owners.data();
    }
    if (call.expected && call.prompt_rule == PromptRule::given) {
        for (int64_t r = 0; r < R; ++r) {
            if (prompt[r] < 0 || prompt[r] >= call.prompts) return false;
        }
    }
    // body(first response, its prompt or null, how many): the responses in runs whose prompts are numbered in order, or
    // all of them with a list of prompts.
    const auto by_prompt = [&](const auto& body) {
        if (prompt || call.prompt_rule != PromptRule::halves) {
            body(int64_t{0}, int64_t{0}, R);
        } else {
            body(int64_t{0}, int64_t{0}, M);
            body(M, int64_t{0}, M);
        }
    };

    std::vector<T> slopes(weighed && call.pairs >= 0 ? R : 0);  // d score / d reward
    T* const slope = call.pairs < 0 ? call.gradient : slopes.data();
    const T one_slope = K > 0 ? share : T(1);
    int64_t flips = 0;
    if (weighed) {
        for (int64_t r = 0; r < R; ++r) {
            double sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += weight[r * K + k];
            flips += sum > N;
            slope[r] = static_cast<T>(1.0 - sum / N);
            call.score[r] = slope[r] * call.reward[r];
        }
    } else {
        if (call.pairs < 0) std::fill(slope, slope + R, one_slope);
        for (int64_t r = 0; r < R; ++r) call.score[r] = one_slope * call.reward[r];
    }
    if (call.expected) {
        by_prompt([&](int64_t first, int64_t at, int64_t count) {
            T* const score = call.score + first;
            const T* const expected = call.expected + at;
            if (prompt) {
                for (int64_t i = 0; i < count; ++i) score[i] -= share * expected[prompt[i]];
            } else {
                for (int64_t i = 0; i < count; ++i) score[i] -= share * expected[i];
            }
        });
    }
    int odd = 0;
    for (int64_t r = 0; r < R; ++r) odd |= !is_finite(call.score[r]);
    bool doubtful = odd != 0;
    if (call.pairs < 0) return !doubtful;

    constexpr int64_t kBlock = 256;
    alignas(64) T chosen[kBlock], rejected[kBlock], shift[kBlock], smoothing[kBlock], pair_weight[kBlock];
    alignas(64) T upper[kBlock], lower[kBlock], chosen_slope[kBlock], rejected_slope[kBlock];
    int64_t chosen_at[kBlock], rejected_at[kBlock];
    // Halves write every one; a list (which has no address when it is empty) adds to them.
    if (call.pair || 2 * M != R) std::fill(call.gradient, call.gradient + R, T(0));
    // Numbers that hold for all are laid out once.
    std::fill(shift, shift + kBlock, call.rank_margin.all);
    std::fill(smoothing, smoothing + kBlock, call.label_smoothing.all);
    std::fill(pair_weight, pair_weight + kBlock, call.pair_weight.all);
    std::fill(upper, upper + kBlock, call.margin.all);
    std::fill(lower, lower + kBlock, call.margin.all);
    const auto lay_out = [&doubtful](const PerItem<T>& item, int64_t start, int64_t count, T* out) {
        if (item.values == nullptr) return;
        std::copy_n(item.values + start, count, out);
        for (int64_t i = 0; i < count; ++i) doubtful |= !is_finite(out[i]);
    };
    double sums[3] = {0, 0, 0};
    int64_t counts[2] = {0, 0};  // wins in halves, violations
    for (int64_t start = 0; start < M; start += kBlock) {
        const int64_t count = std::min(kBlock, M - start);
        const int64_t padded = (count + kPairPadding - 1) / kPairPadding * kPairPadding;
        lay_out(call.rank_margin, start, count, shift);
        lay_out(call.label_smoothing, start, count, smoothing);
        lay_out(call.pair_weight, start, count, pair_weight);
        int outside = 0;
        for (int64_t i = 0; i < count; ++i) outside |= !(smoothing[i] >= T(0)) | !(smoothing[i] <= T(1));
        doubtful |= outside != 0;
        if (call.pair) {
            for (int64_t i = 0; i < count; ++i) {
                const int64_t c = call.pair[2 * (start + i)], r = call.pair[2 * (start + i) + 1];
                if (c < 0 || c >= R || r < 0 || r >= R) return false;
                chosen_at[i] = c;
                rejected_at[i] = r;
                chosen[i] = call.score[c];
                rejected[i] = call.score[r];
                if (call.margin.values) {
                    upper[i] = call.margin.values[c];
                    lower[i] = call.margin.values[r];
                }
            }
        } else {
            std::copy_n(call.score + start, count, chosen);
            std::copy_n(call.score + M + start, count, rejected);
            if (call.margin.values) {
                std::copy_n(call.margin.values + start, count, upper);
                std::copy_n(call.margin.values + M + start, count, lower);
            }
        }
        // Padding: pairs of weight 0 that neither win nor pass a bound.
        for (T* values : {chosen, pair_weight}) std::fill(values + count, values + padded, T(0));
        for (T* values : {rejected, upper, lower}) std::fill(values + count, values + padded, T(1));
        pair_terms<T>(chosen_kernels,
                      {padded, chosen, rejected, shift, smoothing, pair_weight, call.bounds ? upper : nullptr, lower,
                       chosen_slope, rejected_slope, sums, counts});
        if (call.pair) {
            for (int64_t i = 0; i < count; ++i) {
                call.gradient[chosen_at[i]] += chosen_slope[i];
                call.gradient[rejected_at[i]] += rejected_slope[i];
            }
        } else {
            std::copy_n(chosen_slope, count, call.gradient + start);
            std::copy_n(rejected_slope, count, call.gradient + M + start);
        }
    }
    if (call.bounds && call.margin.values) {
        for (int64_t r = 0; r < R; ++r) doubtful |= !is_finite(call.margin.values[r]);
    }

    const double pairs = static_cast<double>(std::max<int64_t>(M, 1));
    const T scale = static_cast<T>(1.0 / pairs);
    for (int64_t r = 0; r < R; ++r) call.gradient[r] *= scale;
    if (call.expected) {
        std::fill(call.expected_gradient, call.expected_gradient + call.prompts, T(0));
        by_prompt([&](int64_t first, int64_t at, int64_t count) {
            const T* const gradient = call.gradient + first;
            T* const out = call.expected_gradient + at;
            if (prompt) {
                for (int64_t i = 0; i < count; ++i) out[prompt[i]] -= share * gradient[i];
            } else {
                for (int64_t i = 0; i < count; ++i) out[i] -= share * gradient[i];
            }
        });
    }
    for (int64_t r = 0; r < R; ++r) call.gradient[r] *= weighed ? slopes[r] : one_slope;
    const double loss = (sums[0] + sums[1] + sums[2]) / pairs;
    doubtful |= !is_finite(loss);
    *call.loss = static_cast<T>(loss);
    for (int i = 0; i < 3; ++i) call.statistics[i] = static_cast<T>(sums[i] / pairs);
    call.statistics[3] = static_cast<T>(0.5 * static_cast<double>(counts[0]) / pairs);
    call.statistics[4] = static_cast<T>(weighed ? effective_sample_size(log_weight, weight, R, K) : R);
    call.statistics[5] = static_cast<T>(static_cast<double>(flips) / static_cast<double>(std::max<int64_t>(R, 1)));
    call.statistics[6] = static_cast<T>(static_cast<double>(counts[1]) / (2.0 * pairs));
    return !doubtful;
}

// One number for all, or the address of one for each.
template <typename T>
void from_python(PyObject* value, PerItem<T>* item) {
    if (PyFloat_Check(value)) {
        item->all = static_cast<T>(PyFloat_AS_DOUBLE(value));
    } else {
        item->values = static_cast<const T*>(PyLong_AsVoidPtr(value));
    }
}

namespace {

template <typename T>
void bind_type(pybind11::module_& m, const char* name) {
    using Call = Advantage<T>;
    define<Call>(m, name, {
        STABLE_RLHF_FIELD(Call, responses),
        STABLE_RLHF_FIELD(Call, prompts),
        STABLE_RLHF_FIELD(Call, pairs),
        STABLE_RLHF_FIELD(Call, policies),
        STABLE_RLHF_FIELD(Call, alternates),
        STABLE_RLHF_FIELD(Call, reward),
        STABLE_RLHF_FIELD(Call, expected),
        STABLE_RLHF_FIELD(Call, prompt_rule),
        STABLE_RLHF_FIELD(Call, prompt),
        STABLE_RLHF_FIELD(Call, pair),
        STABLE_RLHF_FIELD(Call, bounds),
        STABLE_RLHF_FIELD(Call, margin),
        STABLE_RLHF_FIELD(Call, rank_margin),
        STABLE_RLHF_FIELD(Call, label_smoothing),
        STABLE_RLHF_FIELD(Call, pair_weight),
        STABLE_RLHF_FIELD(Call, tokens),
        STABLE_RLHF_FIELD(Call, logprob),
        STABLE_RLHF_FIELD(Call, alt_logprob),
        STABLE_RLHF_FIELD(Call, cu_seqlens),
        STABLE_RLHF_FIELD(Call, length_normalized),
        STABLE_RLHF_FIELD(Call, max_log_weight),
        STABLE_RLHF_FIELD(Call, loss),
        STABLE_RLHF_FIELD(Call, score),
        STABLE_RLHF_FIELD(Call, gradient),
        STABLE_RLHF_FIELD(Call, expected_gradient),
        STABLE_RLHF_FIELD(Call, statistics),
        STABLE_RLHF_FIELD(Call, num_threads),
        STABLE_RLHF_FIELD(Call, isa),
    }, advantage<T>);
}

}  // namespace

void bind_advantage(pybind11::module_& m) {
    bind_type<float>(m, "advantage_f32");
    bind_type<double>(m, "advantage_f64");
}

}  // namespace stable_rlhf
