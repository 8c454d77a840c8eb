// One chunk of logits [n, vocabulary]: each row's softmax statistics, its loss coefficient and its gradient, in place.
//
// Plain pointers only. Every function reads and writes the row [0, vocabulary) and nothing beyond it.
#pragma once

#include <cstdint>

namespace stable_rlhf {

enum class LogitsType : int { f32 = 0, bf16 = 1, f16 = 2 };

enum class RowsMode : int {
    statistics = 0,  // logprob, entropy, max and log_sum; the logits are only read
    policy = 1,      // the same, and the gradient of the policy or rehearsal loss (`PolicyTerms`)
    given = 2,       // the gradient alone, from max, log_sum, entropy and coefficients made elsewhere
};

// What a row is; stable_rlhf.ops.policy.types has the same numbers.
enum class Kind : int8_t { ignored = 0, policy = 1, rehearsal = 2 };

// What the ratio of a policy row is taken for; in the order of stable_rlhf.ops.policy.types.OBJECTIVES.
enum class Objective : int { ppo = 0, cispo = 1, reinforce = 2 };

// What the loss of a row is made of; pointers are [n] and may be null where the option is off.
struct PolicyTerms {
    const Kind* kind;
    const float* old_logprob;     // policy rows; null: on policy, every ratio is 1
    const float* advantage;       // policy rows
    const float* ref_logprob;     // policy rows; null when kl_coef is 0
    const float* row_weight;      // null: 1
    double clip_low, clip_high;
    double dual_clip;             // 0: off
    double kl_coef;
    double kl_clamp;              // bound on the estimate; 0: off
    double kl_ratio_max;          // bound on the ratio that multiplies a gradient apart; 0: off
    int kl_estimator;             // 1, 2, 3; 4: the absolute value
    bool kl_apart;                // the gradient is that of estimator 2
    bool kl_unbiased;             // times the ratio
    Objective objective;
    double entropy_coef;
    double entropy_scale;         // 1 / entropy_denominator; 0: the row's own weight and policy_scale
    double log_ratio_clamp;
    double policy_scale;          // 1 / policy_denominator
    double rehearsal_scale;       // rehearsal_coef / rehearsal_denominator
};

struct Rows : PolicyTerms {
    RowsMode mode;
    LogitsType type;
    LogitsType gradient_type;     // that of the logits, or of 16 bits beside float32 logits
    const void* logits;
    void* gradient;               // may be `logits`; so may rows of 16 bits that begin where the logits' rows do
    int64_t logits_stride, gradient_stride;  // elements from row to row
    const int64_t* row;           // [n] which row of logits and gradient row i is; null: row i
    int64_t count, vocabulary;
    const int64_t* target;        // [n]; outside [0, vocabulary): the target lies in another slice of the vocabulary
    const float* inverse_temperature;  // [n]; null: that of all
    float inverse_temperature_of_all;
    float softcap;                // 0: off
    float* coefficient;           // [n] d loss / d logprob: written by `policy`, read by `given`
    float* entropy_coefficient;   // [n] d loss / d entropy: the same; null in `given`: 0
    float* logprob;               // [n] written; 0 where the target lies outside
    float* entropy;               // [n] written; read by `given` when entropy_coefficient is there
    float* max;                   // [n] written; read by `given`
    float* log_sum;               // [n] log of the sum of exp(z - max): written; read by `given`
    float* weighted;              // [n] sum of exp(z - max) (z - max) over sum of exp(z - max): written; may be null
    float* target_logit;          // [n] z of the target minus max: written; may be null
    // [n] or null. `policy`: rows with a zero coefficient are left out and gradient row j belongs to logits row kept[j].
    // Without it every gradient row stays at its place, and those are zero.
    int64_t* kept;
    int num_threads;
    bool between_products;        // torch's workers are awake: far fewer rows are worth them
    const char* isa;              // one of isa_names(), or "" for the best this processor has
};

// Floats that a thread needs beside a row: what `policy` keeps of it from statistics to gradient, in blocks of 1024.
static constexpr int64_t kept_floats(int64_t vocabulary) { return (vocabulary + 1023) / 1024 * (1024 + 1); }

// Runs one chunk and returns the number of gradient rows that count.
int64_t rows(const Rows& call);

// Gradient rows for bounded-error column selection: `inverse_scale` [count] makes |gradient| a share of a row's mass.
struct Columns {
    LogitsType type;
    const void* gradient;
    const int64_t* rows;      // [count] which gradient rows
    int64_t stride, count, vocabulary;
    const float* inverse_scale;
    const float* thresholds;  // [num_thresholds], at most kMaxThresholds
    int num_thresholds;
    float* peaks;             // [vocabulary]: largest share of each column over the rows
    float* masses;            // [count, num_thresholds]: share of each row in columns whose peak is below a threshold
    int num_threads;
    const char* isa;
};
constexpr int kMaxThresholds = 8;

void column_peaks(const Columns& call);
void dropped_masses(const Columns& call);

// out[i, j] = gradient[rows[i], columns[j]], for elements of `bytes` (2 or 4).
struct GatheredColumns {
    const void* gradient;
    int64_t stride;
    int bytes;
    const int64_t* rows;
    int64_t num_rows;
    const int64_t* columns;
    int64_t num_columns;
    void* out;
    int num_threads;
};
void gather_columns(const GatheredColumns& call);

}  // namespace stable_rlhf
