// Loops over rows, a few values each, on one thread: there are as many rows as tokens.
#include "policy_call.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "fields.h"

namespace stable_rlhf {
namespace {

constexpr int64_t kIgnore = -100;  // formula's IGNORE

}  // namespace

std::vector<int64_t> choose_rows(const Choice& call) {
    int64_t active = 0, policy = 0;
    bool sound = true;
    for (int64_t i = 0; i < call.count; ++i) {
        const int64_t target = call.target[i], kind = call.kind ? call.kind[i] : 1;
        sound = sound && kind >= 0 && kind <= 2;
        if (target == kIgnore || kind == 0) continue;
        sound = sound && target >= 0 && target < call.vocabulary;
        call.index[active] = i;
        call.chosen[active] = target;
        call.kinds[active] = static_cast<int8_t>(kind);
        ++active;
        policy += kind == 1;
    }
    return {active, policy, sound};
}

bool gather_rows(const Gathering& call) {
    const float* const sources[kPerRow] = {call.old_logprob, call.advantage, call.ref_logprob, call.row_weight};
    bool sound = true;
    for (int which = 0; which < kPerRow; ++which) {
        const float* const source = sources[which];
        if (source == nullptr) continue;
        float* const out = call.out + which * call.count;
        const bool every_kind = source == call.row_weight;
        for (int64_t i = 0; i < call.count; ++i) {
            const bool taken = every_kind || call.kind[i] == Kind::policy;
            out[i] = taken ? source[call.index ? call.index[i] : i] : 0.0f;
            sound = sound && std::isfinite(out[i]);
        }
    }
    return sound;
}

namespace {

double clamped(double x, double bound) { return std::min(std::max(x, -bound), bound); }

double kl_estimate(const PolicyTerms& t, double apart) {
    double estimate = apart;
    switch (t.kl_estimator) {
        case 2: estimate = 0.5 * apart * apart; break;
        case 3: estimate = std::expm1(-apart) + apart; break;
        case 4: estimate = std::fabs(apart); break;
    }
    return t.kl_clamp > 0 ? clamped(estimate, t.kl_clamp) : estimate;
}

struct Sums {
    double policy = 0, rehearsal = 0, approx_kl = 0, ref_kl = 0, entropy = 0;
    float max_ratio = 0;
    int64_t policies = 0, clipped = 0, below = 0, above = 0;
};

// The row kernel's `coefficients` are the derivatives of this.
void add_policy_row(const Totals& t, int64_t i, Sums* sums) {
    const double logprob = t.logprob[i], entropy = t.entropy[i], advantage = t.advantage[i];
    const double weight = t.row_weight ? double(t.row_weight[i]) : 1.0;
    const double log_ratio = t.old_logprob ? clamped(logprob - double(t.old_logprob[i]), t.log_ratio_clamp) : 0.0;
    const double ratio = std::exp(log_ratio), low = 1.0 - t.clip_low, high = 1.0 + t.clip_high;
    // In float32, as the reference compares: a ratio at an edge is on the same side for both.
    const float rounded = static_cast<float>(ratio);
    bool below = rounded < static_cast<float>(low), above = rounded > static_cast<float>(high), clipped = false;
    double surrogate = advantage;
    switch (t.objective) {
        case Objective::ppo:
            below = below && advantage < 0;
            above = above && advantage > 0;
            clipped = below || above;
            surrogate *= below ? low : above ? high : ratio;
            if (t.dual_clip > 0 && advantage < 0 && rounded > static_cast<float>(t.dual_clip)) {
                clipped = true;
                surrogate = t.dual_clip * advantage;
            }
            break;
        case Objective::cispo:
            clipped = below || above;
            surrogate *= (below ? low : above ? high : ratio) * logprob;
            break;
        case Objective::reinforce:
            below = above = false;
            surrogate *= logprob;
            break;
    }
    double term = -surrogate;
    if (t.kl_coef != 0) {
        const double kl = kl_estimate(t, clamped(logprob - double(t.ref_logprob[i]), t.log_ratio_clamp));
        sums->ref_kl += kl;
        term += t.kl_coef * (t.kl_unbiased && !t.kl_apart ? kl * ratio : kl);
    }
    const double bonus = t.entropy_coef * entropy;
    // An entropy denominator of its own, over which every row counts alike.
    sums->policy += t.entropy_scale > 0 ? term * weight * t.policy_scale - bonus * t.entropy_scale
                                        : (term - bonus) * weight * t.policy_scale;
    sums->approx_kl += std::expm1(log_ratio) - log_ratio;
    sums->entropy += entropy;
    sums->max_ratio = std::max(sums->max_ratio, rounded);
    sums->policies += 1;
    sums->clipped += clipped;
    sums->below += below;
    sums->above += above;
}

}  // namespace

bool policy_totals(const Totals& call) {
    Sums sums;
    bool sound = true;
    if (call.logprobs) {  // there are places of rows that are not active: all of them, it may be
        std::fill_n(call.logprobs, call.places, 0.0f);
        std::fill_n(call.entropies, call.places, 0.0f);
    }
    for (int64_t i = 0; i < call.count; ++i) {
        const float logprob = call.logprob[i], entropy = call.entropy[i];
        sound = sound && std::isfinite(logprob) && std::isfinite(entropy);
        if (call.logprobs) {
            call.logprobs[call.index[i]] = logprob;
            call.entropies[call.index[i]] = entropy;
        }
        if (call.kind[i] == Kind::policy) {
            add_policy_row(call, i, &sums);
        } else {
            const double weight = call.row_weight ? double(call.row_weight[i]) : 1.0;
            sums.rehearsal -= logprob * weight * call.rehearsal_scale;
        }
    }
    const double count = static_cast<double>(std::max<int64_t>(sums.policies, 1));
    *call.loss = static_cast<float>(sums.policy + call.rehearsal_coef * sums.rehearsal);
    const double metrics[] = {
        sums.policy,
        sums.rehearsal,
        static_cast<double>(sums.clipped) / count,
        static_cast<double>(sums.below) / count,
        static_cast<double>(sums.above) / count,
        sums.approx_kl / count,
        sums.ref_kl / count,
        sums.max_ratio,
        sums.entropy / count,
    };
    std::copy(std::begin(metrics), std::end(metrics), call.metrics);
    call.counts[0] = sums.policies;
    call.counts[1] = call.count - sums.policies;
    return sound;
}

void bind_policy_call(pybind11::module_& m) {
    define<Choice>(m, "choose_rows", {
        STABLE_RLHF_FIELD(Choice, target),
        STABLE_RLHF_FIELD(Choice, kind),
        STABLE_RLHF_FIELD(Choice, count),
        STABLE_RLHF_FIELD(Choice, vocabulary),
        STABLE_RLHF_FIELD(Choice, index),
        STABLE_RLHF_FIELD(Choice, chosen),
        STABLE_RLHF_FIELD(Choice, kinds),
    }, choose_rows);
    define<Gathering>(m, "gather_rows", {
        STABLE_RLHF_FIELD(Gathering, kind),
        STABLE_RLHF_FIELD(Gathering, index),
        STABLE_RLHF_FIELD(Gathering, count),
        STABLE_RLHF_FIELD(Gathering, old_logprob),
        STABLE_RLHF_FIELD(Gathering, advantage),
        STABLE_RLHF_FIELD(Gathering, ref_logprob),
        STABLE_RLHF_FIELD(Gathering, row_weight),
        STABLE_RLHF_FIELD(Gathering, out),
    }, gather_rows);
    define<Totals>(m, "policy_totals", {
        STABLE_RLHF_FIELD(Totals, logprob),
        STABLE_RLHF_FIELD(Totals, entropy),
        STABLE_RLHF_FIELD(Totals, index),
        STABLE_RLHF_FIELD(Totals, count),
        STABLE_RLHF_FIELD(Totals, places),
        STABLE_RLHF_FIELD(Totals, logprobs),
        STABLE_RLHF_FIELD(Totals, entropies),
        STABLE_RLHF_FIELD(Totals, loss),
        STABLE_RLHF_FIELD(Totals, metrics),
        STABLE_RLHF_FIELD(Totals, counts),
        STABLE_RLHF_FIELD(Totals, kind),
        STABLE_RLHF_FIELD(Totals, old_logprob),
        STABLE_RLHF_FIELD(Totals, advantage),
        STABLE_RLHF_FIELD(Totals, ref_logprob),
        STABLE_RLHF_FIELD(Totals, row_weight),
        STABLE_RLHF_FIELD(Totals, clip_low),
        STABLE_RLHF_FIELD(Totals, clip_high),
        STABLE_RLHF_FIELD(Totals, dual_clip),
        STABLE_RLHF_FIELD(Totals, kl_coef),
        STABLE_RLHF_FIELD(Totals, kl_clamp),
        STABLE_RLHF_FIELD(Totals, kl_ratio_max),
        STABLE_RLHF_FIELD(Totals, kl_estimator),
        STABLE_RLHF_FIELD(Totals, kl_apart),
        STABLE_RLHF_FIELD(Totals, kl_unbiased),
        STABLE_RLHF_FIELD(Totals, objective),
        STABLE_RLHF_FIELD(Totals, entropy_coef),
        STABLE_RLHF_FIELD(Totals, entropy_scale),
        STABLE_RLHF_FIELD(Totals, log_ratio_clamp),
        STABLE_RLHF_FIELD(Totals, policy_scale),
        STABLE_RLHF_FIELD(Totals, rehearsal_scale),
        STABLE_RLHF_FIELD(Totals, rehearsal_coef),
    }, policy_totals);
}

}  // namespace stable_rlhf
