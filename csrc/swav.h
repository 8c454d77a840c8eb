// SwAV (arXiv 2006.09882) on the scores of two views, cosines of rows and prototypes [2, rows, prototypes]: one Sinkhorn
// step, and the swapped prediction with its gradient in place.
//
// A row's code is softmax(score / epsilon + v), v [2, prototypes] one number for each prototype: Sinkhorn in logarithms,
// where nothing overflows and no code underflows to a row of zeros. Plain pointers only.
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
    int num_threads;
    const char* isa;
};

// Results do not depend on num_threads.
void swav_log_sums(const Swav& call);
double swav_loss(const Swav& call);  // the sum over the rows of both cross-entropies

constexpr int64_t kSwavPadding = 16;  // scratch rows are whole vectors of every instruction set
// Internal to each translation unit, which may be compiled for another instruction set.
static inline int64_t swav_padded(int64_t prototypes) { return (prototypes + kSwavPadding - 1) / kSwavPadding * kSwavPadding; }

}  // namespace stable_rlhf
