// SwAV (arXiv 2006.09882) on the scores of two views, cosines of rows and prototypes [2, rows, prototypes]: one Sinkhorn
// step, and the swapped prediction with its gradient in place.
//
// A row's code is softmax(score / epsilon + v), v [2, prototypes] one number for each prototype: Sinkhorn in logarithms,
// where nothing overflows and no code underflows to a row of zeros. Where exp(2 / epsilon) is far inside of float32, codes
// are made of masses instead, exp((score - 1) / epsilon): one exponential a score, and none in Sinkhorn's steps. Plain
// pointers only.
#pragma once

#include <cstdint>

namespace stable_rlhf {

struct Swav {
    float* scores;            // [2, rows, prototypes]
    int64_t rows, prototypes;
    const float* potential;   // [2, prototypes] v; null in the first step: rows then count as they are
    double inverse_epsilon, inverse_temperature;
    double scale;             // of the gradient: 1 / (2 N)
    bool gradient;            // overwrite the scores by d loss / d score
    float* log_sums;          // [2, prototypes] log sum over the rows of exp(score / epsilon + u), u making a code sum to 1
    float* mass;              // [2, rows, padded] exp((score - kSwavBound) / epsilon), 0 in padding; null: logarithms
    float* weights;           // [2, padded] such that a row's code is mass weights over their sum
    int64_t iterations;       // of swav_balance, 1 or more
    int num_threads;
    const char* isa;
};

// Results do not depend on num_threads.
void swav_balance(const Swav& call);  // makes mass and weights
void swav_log_sums(const Swav& call);
double swav_loss(const Swav& call);  // the sum over the rows of both cross-entropies

constexpr double kSwavMostDigits = 60.0;  // of exp, between the smallest and the largest of a row; products stay in float32
constexpr float kSwavBound = 1.0f + 0x1p-18f;  // above every cosine, whose rounding may leave it above 1
constexpr int64_t kSwavPadding = 16;  // scratch rows are whole vectors of every instruction set
// Internal to each translation unit, which may be compiled for another instruction set.
static inline int64_t swav_padded(int64_t prototypes) { return (prototypes + kSwavPadding - 1) / kSwavPadding * kSwavPadding; }

}  // namespace stable_rlhf
