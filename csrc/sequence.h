// Operations on packed sequences: sequence s is [cu_seqlens[s], cu_seqlens[s + 1]) of T tokens.
//
// Values are judged where they are used: a call that finds something wrong says so by its status, and the Python caller
// then looks for the argument and the position to name. A call whose limits are wrong reads and writes no token.
#pragma once

#include <cstdint>

namespace stable_rlhf {

enum class SequenceStatus : int { fine = 0, bad_limits = 1, bad_values = 2, no_kernels = 3 };

// Generalised advantage estimation. bootstrap_value may be null (0 after the end). `decay` is gamma * lambda, rounded
// once by the caller as PyTorch does. bad_values: a result is not finite, which a finite input can only cause by
// overflow.
template <typename T>
SequenceStatus gae(const T* reward, const T* value, const int64_t* cu_seqlens, const T* bootstrap_value,
                   int64_t num_sequences, int64_t tokens, T gamma, T decay, int num_threads, T* advantage, T* returns);

// -kl_coef kl(logprob - ref_logprob, clamped) for every token, and the score on each sequence's last one.
// bad_limits: also where a sequence is empty. bad_values: a score or a difference of log-probs is not finite.
// no_kernels: this processor lacks the instruction set `isa` (isa.h).
template <typename T>
SequenceStatus token_rewards(const T* logprob, const T* ref_logprob, const T* score, const int64_t* cu_seqlens,
                             int64_t num_sequences, int64_t tokens, T kl_coef, int kl_estimator, T clamp,
                             int num_threads, T* reward, const char* isa);

// Number, mean and sum of squared distances from the mean of the elements where mask is not 0 (null: of all), in
// float64, the same for any number of threads. The mean is not finite where an element is not.
struct Moments {
    double count;
    double mean;
    double square;
};

template <typename T>
Moments masked_moments(const T* x, const uint8_t* mask, int64_t n, int num_threads);

// (x - mean) / sqrt(variance) in float64, plus the mean unless shift_mean; 0 under the mask.
template <typename T>
void masked_scale(const T* x, const uint8_t* mask, int64_t n, double mean, double variance, bool shift_mean,
                  int num_threads, T* out);

}  // namespace stable_rlhf
