// Generalised advantage estimation (Schulman et al. 2016, eq. 16) and per-token rewards on packed sequences.
#include "sequence_ops.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.h"

namespace stable_rlhf {
namespace {

constexpr int64_t kGrain = 1 << 15;  // tokens of one piece of work: some 50 us, a few times what a thread costs

bool limits_fit(const int64_t* cu_seqlens, int64_t num_sequences, int64_t tokens, int64_t shortest) {
    if (cu_seqlens[0] != 0 || cu_seqlens[num_sequences] != tokens) return false;
    bool fit = true;
    for (int64_t s = 0; s < num_sequences; ++s) fit &= cu_seqlens[s + 1] - cu_seqlens[s] >= shortest;
    return fit;
}

// Sequences are walked from their ends. Each step of the recurrence waits for the one before it, so one thread walks
// several sequences at a time; what does not wait is done in whole vectors, a stretch of kStretch tokens before and after.
constexpr int kLanes = 8;
constexpr int kStretch = 128;

template <typename T>
struct Lane {
    int64_t begin;  // of the sequence
    int64_t end;    // of what is left of it
    T next_value;
    T running;
};

template <typename T>
struct GaeCall {
    const T* reward;
    const T* value;
    T gamma;
    T decay;
    T* advantage;
    T* returns;
};

template <int lanes, typename T>
void recur(Lane<T>* lane, T (*stretch)[kStretch], int length, T decay) {
    T running[lanes];
    for (int i = 0; i < lanes; ++i) running[i] = lane[i].running;
    for (int j = length - 1; j >= 0; --j) {
        for (int i = 0; i < lanes; ++i) {
            running[i] = stretch[i][j] + decay * running[i];
            stretch[i][j] = running[i];
        }
    }
    for (int i = 0; i < lanes; ++i) lane[i].running = running[i];
}

// Takes `lanes` lanes `length` tokens further. The order of operations is the PyTorch reference's: the same bits.
template <typename T>
void advance(const GaeCall<T>& call, Lane<T>* lane, int lanes, int length, T (*stretch)[kStretch]) {
    for (int i = 0; i < lanes; ++i) {
        const int64_t at = lane[i].end - length;
        const T* reward = call.reward + at;
        const T* value = call.value + at;
        T* delta = stretch[i];
        const T gamma = call.gamma;
        for (int j = 0; j < length - 1; ++j) delta[j] = (reward[j] + gamma * value[j + 1]) - value[j];
        delta[length - 1] = (reward[length - 1] + gamma * lane[i].next_value) - value[length - 1];
        lane[i].next_value = value[0];
    }
    switch (lanes) {
        case 8: recur<8>(lane, stretch, length, call.decay); break;
        case 7: recur<7>(lane, stretch, length, call.decay); break;
        case 6: recur<6>(lane, stretch, length, call.decay); break;
        case 5: recur<5>(lane, stretch, length, call.decay); break;
        case 4: recur<4>(lane, stretch, length, call.decay); break;
        case 3: recur<3>(lane, stretch, length, call.decay); break;
        case 2: recur<2>(lane, stretch, length, call.decay); break;
        default: recur<1>(lane, stretch, length, call.decay); break;
    }
    for (int i = 0; i < lanes; ++i) {
        lane[i].end -= length;
        const T* value = call.value + lane[i].end;
        T* advantage = call.advantage + lane[i].end;
        T* returns = call.returns + lane[i].end;
        for (int j = 0; j < length; ++j) {
            advantage[j] = stretch[i][j];
            returns[j] = stretch[i][j] + value[j];
        }
    }
}

}  // namespace

template <typename T>
SequenceStatus gae(const T* reward, const T* value, const int64_t* cu_seqlens, const T* bootstrap_value,
                   int64_t num_sequences, int64_t tokens, T gamma, T decay, int num_threads, T* advantage, T* returns) {
    if (!limits_fit(cu_seqlens, num_sequences, tokens, 0)) return SequenceStatus::bad_limits;
    std::atomic<bool> finite{true};
    for (int64_t s = 0; bootstrap_value && s < num_sequences; ++s) {
        if (!std::isfinite(bootstrap_value[s])) finite = false;  // those of empty sequences reach no result
    }
    const GaeCall<T> call{reward, value, gamma, decay, advantage, returns};
    // Work is shared by tokens: a block's sequences are those that begin in it, however long they are.
    parallel_for(tokens, kGrain, num_threads, [&](int64_t from, int64_t to) {
        const int64_t* last = cu_seqlens + num_sequences;
        int64_t s = std::lower_bound(cu_seqlens, last, from) - cu_seqlens;
        const int64_t past = std::lower_bound(cu_seqlens, last, to) - cu_seqlens;
        Lane<T> lane[kLanes];
        T stretch[kLanes][kStretch];
        int lanes = 0;
        bool sound = true;
        while (true) {
            for (; lanes < kLanes && s < past; ++s) {
                if (cu_seqlens[s] == cu_seqlens[s + 1]) continue;
                lane[lanes++] = {cu_seqlens[s], cu_seqlens[s + 1], bootstrap_value ? bootstrap_value[s] : T(0), T(0)};
            }
            if (lanes == 0) break;
            int64_t length = kStretch;
            for (int i = 0; i < lanes; ++i) length = std::min(length, lane[i].end - lane[i].begin);
            advance(call, lane, lanes, static_cast<int>(length), stretch);
            int left = 0;
            for (int i = 0; i < lanes; ++i) {
                if (lane[i].end > lane[i].begin) {
                    lane[left++] = lane[i];
                } else {
                    // Infinity and NaN survive every later step, a product with 0 included: one look at the first
                    // token is a look at all of the sequence.
                    sound &= std::isfinite(lane[i].running);
                }
            }
            lanes = left;
        }
        if (!sound) finite = false;
    });
    return finite ? SequenceStatus::fine : SequenceStatus::bad_values;
}

namespace {

// exp(x) - 1 - x, the k3 estimator at x = -log_ratio. Near 0 both subtractions cancel: there the series, with every
// term that counts for |x| < 1 (relative error below 1e-7 and 1e-15).
template <typename T>
T exp_remainder_near(T x) {
    constexpr int terms = sizeof(T) == 4 ? 11 : 19;
    T sum = 1;
    for (int i = terms; i > 2; --i) sum = T(1) + x * (T(1) / T(i)) * sum;
    return T(0.5) * x * x * sum;
}

// Without branches or calls, so that compilers make vectors of it. Infinite from 88.73 on, as exp is.
inline float exp_of(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    x = x < -100.0f ? -100.0f : x;    // far below what counts beside -1 - x
    x = x > 100.0f ? 100.0f : x;
    const float shifted = x * 1.44269504088896341f + magic;
    const float n = shifted - magic;
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^n in two factors, for n runs beyond the exponents of one.
    const int32_t whole = static_cast<int32_t>(n);
    const int32_t half = whole >> 1;
    const uint32_t raw[2] = {static_cast<uint32_t>(half + 127) << 23, static_cast<uint32_t>(whole - half + 127) << 23};
    float power[2];
    std::memcpy(power, raw, sizeof(power));
    return p * power[0] * power[1];
}
inline double exp_of(double x) { return std::exp(x); }

template <int estimator, typename T>
bool kl_rewards(const T* logprob, const T* ref_logprob, int64_t n, T scale, T clamp, T* reward) {
    int unsound = 0;
    for (int64_t t = 0; t < n; ++t) {
        T d = logprob[t] - ref_logprob[t];
        // Looked at before the clamp, which would hide an infinity.
        unsound |= !(std::abs(d) <= std::numeric_limits<T>::max());
        d = d < -clamp ? -clamp : d;
        d = d > clamp ? clamp : d;
        T kl = d;
        if (estimator == 2) kl = T(0.5) * d * d;
        if (estimator == 3) {
            const T x = -d;
            const T far = exp_of(x) - T(1) - x;
            const T near = exp_remainder_near(x);
            kl = std::abs(x) < T(1) ? near : far;
        }
        reward[t] = kl * scale;
    }
    return !unsound;
}

}  // namespace

template <typename T>
SequenceStatus token_rewards(const T* logprob, const T* ref_logprob, const T* score, const int64_t* cu_seqlens,
                             int64_t num_sequences, int64_t tokens, T kl_coef, int kl_estimator, T clamp,
                             int num_threads, T* reward) {
    if (!limits_fit(cu_seqlens, num_sequences, tokens, 1)) return SequenceStatus::bad_limits;
    std::atomic<bool> finite{true};
    const auto rewards = kl_estimator == 1 ? kl_rewards<1, T> : kl_estimator == 2 ? kl_rewards<2, T> : kl_rewards<3, T>;
    parallel_for(tokens, kGrain, num_threads, [&](int64_t from, int64_t to) {
        bool sound = rewards(logprob + from, ref_logprob + from, to - from, -kl_coef, clamp, reward + from);
        // The sequences whose last token, cu_seqlens[s + 1] - 1, lies in this block.
        const int64_t* ends = cu_seqlens + 1;
        for (int64_t s = std::upper_bound(ends, ends + num_sequences, from) - ends; s < num_sequences && ends[s] <= to;
             ++s) {
            sound &= std::isfinite(score[s]);
            reward[ends[s] - 1] += score[s];
        }
        if (!sound) finite = false;
    });
    return finite ? SequenceStatus::fine : SequenceStatus::bad_values;
}

#define STABLE_RLHF_INSTANTIATE(T)                                                                                   \
    template SequenceStatus gae<T>(const T*, const T*, const int64_t*, const T*, int64_t, int64_t, T, T, int, T*, T*); \
    template SequenceStatus token_rewards<T>(const T*, const T*, const T*, const int64_t*, int64_t, int64_t, T, int, T, \
                                             int, T*);
STABLE_RLHF_INSTANTIATE(float)
STABLE_RLHF_INSTANTIATE(double)
#undef STABLE_RLHF_INSTANTIATE

}  // namespace stable_rlhf
