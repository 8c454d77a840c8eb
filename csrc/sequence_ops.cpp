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

// Sequences go in groups of about so many tokens, whose arrays stay in the second cache between the three passes below.
constexpr int64_t kGroup = 8192;
constexpr int kLanes = 8;

// What is left of a sequence, walked from its end.
template <typename T>
struct Lane {
    T* begin;
    T* end;
    T running;
};

// Takes `lanes` sequences `length` tokens further: each step waits for the one before it, but not for its neighbours.
template <int lanes, typename T>
void recur(Lane<T>* lane, int64_t length, T decay) {
    T running[lanes];
    T* at[lanes];
    for (int i = 0; i < lanes; ++i) {
        running[i] = lane[i].running;
        at[i] = lane[i].end - 1;
    }
    for (int64_t j = 0; j > -length; --j) {
        for (int i = 0; i < lanes; ++i) {
            running[i] = at[i][j] + decay * running[i];
            at[i][j] = running[i];
        }
    }
    for (int i = 0; i < lanes; ++i) {
        lane[i].running = running[i];
        lane[i].end -= length;
    }
}

// Turns the deltas of the sequences [s, past) into advantages, in place. Returns whether these are finite.
template <typename T>
bool recur_all(T* advantage, const int64_t* cu_seqlens, int64_t s, int64_t past, T decay) {
    Lane<T> lane[kLanes];
    int lanes = 0;
    bool sound = true;
    while (true) {
        for (; lanes < kLanes && s < past; ++s) {
            if (cu_seqlens[s] == cu_seqlens[s + 1]) continue;
            lane[lanes++] = {advantage + cu_seqlens[s], advantage + cu_seqlens[s + 1], T(0)};
        }
        if (lanes == 0) return sound;
        int64_t length = lane[0].end - lane[0].begin;
        for (int i = 1; i < lanes; ++i) length = std::min<int64_t>(length, lane[i].end - lane[i].begin);
        switch (lanes) {
            case 8: recur<8>(lane, length, decay); break;
            case 7: recur<7>(lane, length, decay); break;
            case 6: recur<6>(lane, length, decay); break;
            case 5: recur<5>(lane, length, decay); break;
            case 4: recur<4>(lane, length, decay); break;
            case 3: recur<3>(lane, length, decay); break;
            case 2: recur<2>(lane, length, decay); break;
            default: recur<1>(lane, length, decay); break;
        }
        int left = 0;
        for (int i = 0; i < lanes; ++i) {
            if (lane[i].end > lane[i].begin) {
                lane[left++] = lane[i];
            } else {
                // Infinity and NaN survive every later step, a product with 0 included: one look at the first token is
                // a look at all of the sequence.
                sound &= std::isfinite(lane[i].running);
            }
        }
        lanes = left;
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
    // Work is shared by tokens: a block's sequences are those that begin in it, however long they are. Sums are in the
    // order of the PyTorch reference: the same bits.
    parallel_for(tokens, kGrain, num_threads, [&](int64_t from, int64_t to) {
        const int64_t* last = cu_seqlens + num_sequences;
        int64_t s = std::lower_bound(cu_seqlens, last, from) - cu_seqlens;
        const int64_t past = std::lower_bound(cu_seqlens, last, to) - cu_seqlens;
        bool sound = true;
        while (s < past) {
            int64_t next = s + 1;
            while (next < past && cu_seqlens[next + 1] - cu_seqlens[s] <= kGroup) ++next;
            const int64_t begin = cu_seqlens[s], end = cu_seqlens[next];
            for (int64_t t = begin; t < end - 1; ++t) advantage[t] = (reward[t] + gamma * value[t + 1]) - value[t];
            for (int64_t i = s; i < next; ++i) {
                const int64_t t = cu_seqlens[i + 1] - 1;
                const T after = bootstrap_value ? bootstrap_value[i] : T(0);
                if (t >= cu_seqlens[i]) advantage[t] = (reward[t] + gamma * after) - value[t];
            }
            sound &= recur_all(advantage, cu_seqlens, s, next, decay);
            for (int64_t t = begin; t < end; ++t) returns[t] = advantage[t] + value[t];
            s = next;
        }
        if (!sound) finite = false;
    });
    return finite ? SequenceStatus::fine : SequenceStatus::bad_values;
}

namespace {

// Four lanes on the compiler's vector types: SSE2 on x86-64, NEON on ARM.
constexpr int kWidth = 4;
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

template <int terms, typename T>
struct InverseFactorials {
    T of[terms + 1]{};
    constexpr InverseFactorials() {
        double factorial = 1;
        for (int i = 1; i <= terms; ++i) of[i] = static_cast<T>(1 / (factorial *= i));
    }
};

// exp(x) - 1 - x near 0, where both subtractions cancel: the series, with every term that counts for |x| < 1 (relative
// error below 1e-7 in float, 1e-15 in double).
template <int terms, int count, typename T, typename X>
void exp_remainder_near(const X* x, X* y) {
    constexpr InverseFactorials<terms, T> inverse_factorial;
    for (int i = 0; i < count; ++i) y[i] = x[i] * inverse_factorial.of[terms] + inverse_factorial.of[terms - 1];
    for (int term = terms - 2; term > 1; --term) {
        for (int i = 0; i < count; ++i) y[i] = y[i] * x[i] + inverse_factorial.of[term];
    }
    for (int i = 0; i < count; ++i) y[i] = x[i] * x[i] * y[i];
}

// exp for |x| up to 200, infinite from 88.73 on, 0 below -87.3.
Floats exp_of(Floats x) {
    const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Floats shifted = x * 1.44269504088896341f + magic;
    const Floats n = shifted - magic;
    Floats r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^n in two factors, for n runs beyond the exponents of one.
    const Ints whole = (Ints)shifted - (Ints)magic;
    const Ints half = whole >> 1;
    const Floats y = p * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23);
    return x < -87.3f ? Floats{} : y;
}

// kl[t] = exp(-d) - 1 + d, the k3 estimator.
void k3(const double* d, int64_t n, double* kl) {
    for (int64_t t = 0; t < n; ++t) {
        const double x = -d[t];
        double near;
        exp_remainder_near<19, 1, double>(&x, &near);
        kl[t] = std::abs(x) < 1 ? near : std::exp(x) - 1 - x;
    }
}
void k3(const float* d, int64_t n, float* kl) {
    constexpr int pair = 2;  // whose chains of operations overlap
    for (int64_t t = 0; t < n; t += pair * kWidth) {
        const size_t bytes = sizeof(float) * std::min<int64_t>(pair * kWidth, n - t);
        Floats x[pair]{}, y[pair];
        std::memcpy(x, d + t, bytes);
        for (int i = 0; i < pair; ++i) x[i] = -x[i];
        exp_remainder_near<11, pair, float>(x, y);
        Ints beyond[pair], any{};
        for (int i = 0; i < pair; ++i) {
            beyond[i] = (x[i] >= 1.0f) | (x[i] <= -1.0f);
            any |= beyond[i];
        }
        if (any[0] | any[1] | any[2] | any[3]) {  // log-ratios are mostly small
            for (int i = 0; i < pair; ++i) {
                // Beyond 200 the exponential is infinite, or nothing beside -1 - x.
                Floats bounded = x[i] > 200.0f ? Floats{} + 200.0f : x[i];
                bounded = bounded < -200.0f ? Floats{} - 200.0f : bounded;
                const Floats far = exp_of(bounded) - 1.0f - x[i];
                y[i] = beyond[i] ? far : y[i];
            }
        }
        std::memcpy(kl + t, y, bytes);
    }
}

template <typename T>
bool kl_rewards(const T* logprob, const T* ref_logprob, int64_t n, T scale, int estimator, T clamp, T* reward) {
    constexpr int64_t stretch = 256;  // in the first cache between the loops, each of which makes vectors
    int unsound = 0;
    for (int64_t from = 0; from < n; from += stretch) {
        const int64_t length = std::min(stretch, n - from);
        T d[stretch];
        for (int64_t t = 0; t < length; ++t) {
            d[t] = logprob[from + t] - ref_logprob[from + t];
            // Looked at before the clamp, which would hide an infinity.
            unsound |= !(std::abs(d[t]) <= std::numeric_limits<T>::max());
            d[t] = d[t] < -clamp ? -clamp : d[t];
            d[t] = d[t] > clamp ? clamp : d[t];
        }
        if (estimator == 2) {
            for (int64_t t = 0; t < length; ++t) d[t] = T(0.5) * d[t] * d[t];
        } else if (estimator == 3) {
            k3(d, length, d);
        }
        for (int64_t t = 0; t < length; ++t) reward[from + t] = d[t] * scale;
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
    parallel_for(tokens, kGrain, num_threads, [&](int64_t from, int64_t to) {
        bool sound =
            kl_rewards(logprob + from, ref_logprob + from, to - from, -kl_coef, kl_estimator, clamp, reward + from);
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
