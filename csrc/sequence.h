// Operations on packed sequences: sequence s is [cu_seqlens[s], cu_seqlens[s + 1]) of T tokens.
//
// Values are judged where they are used: a call that finds something wrong says so by its status, and the Python caller
// then looks for the argument and the position to name. A call whose limits are wrong reads and writes no token.
#pragma once

#include <cstdint>

namespace stable_rlhf {

enum class SequenceStatus : int { fine = 0, bad_limits = 1, bad_values = 2 };

template <typename T>
struct Gae {
    const T* reward;            // [tokens]
    const T* value;             // [tokens]
    const int64_t* cu_seqlens;  // [num_sequences + 1]
    const T* bootstrap_value;   // [num_sequences]; null: 0 after the end
    int64_t num_sequences, tokens;
    T gamma;
    T decay;                    // gamma * lambda, rounded once by the caller as PyTorch does
    int num_threads;
    T* advantage;               // [tokens]
    T* returns;                 // [tokens]
};

// Generalised advantage estimation. bad_values: a result is not finite, which a finite input can only cause by overflow.
template <typename T>
SequenceStatus gae(const Gae<T>& call);

template <typename T>
struct TokenRewards {
    const T* logprob;           // [tokens]
    const T* ref_logprob;       // [tokens]
    const T* score;             // [num_sequences]
    const int64_t* cu_seqlens;  // [num_sequences + 1]
    int64_t num_sequences, tokens;
    T kl_coef;
    int kl_estimator;           // 1, 2, 3
    T clamp;
    int num_threads;
    T* reward;                  // [tokens]
    const char* isa;
};

// -kl_coef kl(logprob - ref_logprob, clamped) for every token, and the score on each sequence's last one.
// bad_limits: also where a sequence is empty. bad_values: a score or a difference of log-probs is not finite.
template <typename T>
SequenceStatus token_rewards(const TokenRewards<T>& call);

}  // namespace stable_rlhf
