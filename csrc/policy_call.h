// What a call of the policy losses does once: choose its rows, gather their arguments, and sum their losses and metrics.
// The twins of formula.select_rows, gather_terms and total_loss, which take some two hundred small operations of torch
// between them: on a few rows those cost more than the products.
#pragma once

#include <cstdint>
#include <vector>

#include "policy.h"

namespace stable_rlhf {

struct Choice {
    const int64_t* target;  // [count]
    const int64_t* kind;    // [count]; null: all are policy rows
    int64_t count, vocabulary;
    int64_t* index;         // [count], of which the first `active` are written, as are the next two
    int64_t* chosen;        // their targets
    int8_t* kinds;
};

// {active, policy, sound}: how many rows are active, how many of them are policy rows, and whether every kind is 0, 1 or
// 2 and every active row's target in [0, vocabulary).
std::vector<int64_t> choose_rows(const Choice& call);

constexpr int kPerRow = 4;  // old_logprob, advantage, ref_logprob, row_weight

struct Gathering {
    const Kind* kind;      // [count]
    const int64_t* index;  // [count] places in the sources; null: in order
    int64_t count;
    // A source is null where its argument is not there. Rows that are not policy rows get 0, but in row_weight.
    const float *old_logprob, *advantage, *ref_logprob, *row_weight;
    float* out;            // [kPerRow, count]
};

// Whether all that was gathered is finite.
bool gather_rows(const Gathering& call);

struct Totals : PolicyTerms {
    const float *logprob, *entropy;  // [count]
    int64_t count;
    double rehearsal_coef;
    float *logprobs, *entropies;     // [places] the statistics at the rows' places, 0 elsewhere; null: not wanted
    const int64_t* index;            // [count] these places
    int64_t places;
    float* loss;
    float* metrics;                  // in the order of fused.METRICS
    int64_t* counts;                 // rows of the policy, and of rehearsal
};

// Whether all statistics are finite. `entropy_scale` and `rehearsal_scale` of the terms are over the denominators alone,
// without coefficients.
bool policy_totals(const Totals& call);

}  // namespace stable_rlhf
