// The Advantage Model's scores (arXiv 2309.10202, eq. 8), its loss over pairs (eq. 6) and their gradients, in one call.
//
// Plain pointers only; T is float or double.
#pragma once

#include <cstdint>

namespace stable_rlhf {

// One value for each of n things, or one for all.
template <typename T>
struct PerItem {
    const T* values;  // null: `all`
    T all;
};

// Which prompt a response answers; stable_rlhf.ops.advantage.reference has the same numbers.
enum class PromptRule : int { given = 0, halves = 1, of_pairs = 2, same_index = 3 };

template <typename T>
struct Advantage {
    int64_t responses, prompts, pairs;  // pairs < 0: scores and slopes alone
    int64_t policies, alternates;       // N and K
    const T* reward;                    // [responses]
    const T* expected;                  // [prompts]; null: 0
    PromptRule prompt_rule;
    const int64_t* prompt;              // [responses] for `given`
    const int64_t* pair;                // [pairs, 2] chosen, rejected; null: first half against second
    bool bounds;
    PerItem<T> margin;                  // by response
    PerItem<T> rank_margin, label_smoothing, pair_weight;  // by pair
    int64_t tokens;
    const T* logprob;                   // [tokens]; null: the weights are all 1
    const T* alt_logprob;               // [alternates, tokens]
    const int64_t* cu_seqlens;          // [responses + 1]
    bool length_normalized;
    double max_log_weight;              // infinite: weights are not clamped
    T* loss;                            // 0-d
    T* score;                           // [responses]
    T* gradient;                        // [responses] d loss / d reward; with pairs < 0: d score / d reward
    T* expected_gradient;               // [prompts] d loss / d expected, where expected and pairs are given
    T* statistics;                      // [7]: three terms, accuracy, effective sample size, flips, violations
    int num_threads;
    const char* isa;
};

// False when some value looks wrong (out of range, not finite): nothing written counts then, and the caller asks the
// reference, which names it.
template <typename T>
bool advantage(const Advantage<T>& call);

// `count` pairs side by side, a multiple of kPairPadding.
template <typename T>
struct PairBlock {
    int64_t count;
    const T *chosen, *rejected;            // scores
    const T *shift, *smoothing, *weight;   // rank margin, label smoothing, pair weight
    const T *upper, *lower;                // margins of the chosen and the rejected response; null: no bounds
    T *chosen_slope, *rejected_slope;      // out: d (weight * term) / d score
    double* sums;                          // [3] added to: weight * (ranking, upper bound, lower bound)
    int64_t* counts;                       // [2] added to: wins, two for each and one for a tie; scores past a bound
};
constexpr int64_t kPairPadding = 16;

}  // namespace stable_rlhf
