// Generalised advantage estimation (Schulman et al. 2016, eq. 16) and per-token rewards on packed sequences.
#include "sequence.h"

#include <cmath>
#include <limits>

#include "fields.h"
#include "isa.h"
#include "parallel.h"

namespace stable_rlhf {
namespace {

constexpr int64_t kGrain = 1 << 15;  // tokens of one piece of work: some 50 us, a few times what a thread costs
constexpr double kToken = 1.5;       // nanoseconds of one thread for a token

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
SequenceStatus gae(const Gae<T>& call) {
    const T *const reward = call.reward, *const value = call.value, *const bootstrap_value = call.bootstrap_value;
    const int64_t* const cu_seqlens = call.cu_seqlens;
    const int64_t num_sequences = call.num_sequences;
    T *const advantage = call.advantage, *const returns = call.returns;
    const T gamma = call.gamma, decay = call.decay;
    if (!limits_fit(cu_seqlens, num_sequences, call.tokens, 0)) return SequenceStatus::bad_limits;
    std::atomic<bool> finite{true};
    for (int64_t s = 0; bootstrap_value && s < num_sequences; ++s) {
        if (!std::isfinite(bootstrap_value[s])) finite = false;  // those of empty sequences reach no result
    }
    // Work is shared by tokens: a block's sequences are those that begin in it, however long they are. Sums are in the
    // order of the PyTorch reference: the same bits.
    parallel_for(call.tokens, kGrain, kToken, call.num_threads, [&](int64_t from, int64_t to) {
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

// kl[t] = exp(-d) - 1 + d, the k3 estimator. Near 0, where both subtractions cancel, from the series of exp with every
// term that counts for |x| < 1 (relative error below 1e-15); in float the same in sequence_kernel.h.
void k3(const Kernels&, const double* d, int64_t n, double* kl) {
    constexpr int terms = 19;
    for (int64_t t = 0; t < n; ++t) {
        const double x = -d[t];
        double near = 1;
        for (int i = terms; i > 2; --i) near = 1 + x * near / i;
        kl[t] = std::abs(x) < 1 ? 0.5 * x * x * near : std::exp(x) - 1 - x;
    }
}
void k3(const Kernels& kernels, const float* d, int64_t n, float* kl) { kernels.k3(d, n, kl); }

// The rewards of `n` tokens from `first` on, without scores; whether all differences are finite.
template <typename T>
bool kl_rewards(const Kernels& kernels, const TokenRewards<T>& call, int64_t first, int64_t n) {
    const T *const logprob = call.logprob + first, *const ref_logprob = call.ref_logprob + first;
    const T scale = -call.kl_coef, clamp = call.clamp;
    T* const reward = call.reward + first;
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
        if (call.kl_estimator == 2) {
            for (int64_t t = 0; t < length; ++t) d[t] = T(0.5) * d[t] * d[t];
        } else if (call.kl_estimator == 3) {
            k3(kernels, d, length, d);
        }
        for (int64_t t = 0; t < length; ++t) reward[from + t] = d[t] * scale;
    }
    return !unsound;
}

}  // namespace

template <typename T>
SequenceStatus token_rewards(const TokenRewards<T>& call) {
    const Kernels& chosen = kernels(call.isa);
    if (!limits_fit(call.cu_seqlens, call.num_sequences, call.tokens, 1)) return SequenceStatus::bad_limits;
    std::atomic<bool> finite{true};
    parallel_for(call.tokens, kGrain, kToken, call.num_threads, [&](int64_t from, int64_t to) {
        bool sound = kl_rewards(chosen, call, from, to - from);
        // The sequences whose last token, cu_seqlens[s + 1] - 1, lies in this block.
        const int64_t* const ends = call.cu_seqlens + 1;
        const int64_t* const last = ends + call.num_sequences;
        for (int64_t s = std::upper_bound(ends, last, from) - ends; s < call.num_sequences && ends[s] <= to; ++s) {
            sound &= std::isfinite(call.score[s]);
            call.reward[ends[s] - 1] += call.score[s];
        }
        if (!sound) finite = false;
    });
    return finite ? SequenceStatus::fine : SequenceStatus::bad_values;
}

namespace {

template <typename T>
void bind_type(pybind11::module_& m, const std::string& suffix) {
    define<Gae<T>>(m, "gae_" + suffix, {
        STABLE_RLHF_FIELD(Gae<T>, reward),
        STABLE_RLHF_FIELD(Gae<T>, value),
        STABLE_RLHF_FIELD(Gae<T>, cu_seqlens),
        STABLE_RLHF_FIELD(Gae<T>, bootstrap_value),
        STABLE_RLHF_FIELD(Gae<T>, num_sequences),
        STABLE_RLHF_FIELD(Gae<T>, tokens),
        STABLE_RLHF_FIELD(Gae<T>, gamma),
        STABLE_RLHF_FIELD(Gae<T>, decay),
        STABLE_RLHF_FIELD(Gae<T>, num_threads),
        STABLE_RLHF_FIELD(Gae<T>, advantage),
        STABLE_RLHF_FIELD(Gae<T>, returns),
    }, [](const Gae<T>& call) { return static_cast<int>(gae(call)); });
    define<TokenRewards<T>>(m, "token_rewards_" + suffix, {
        STABLE_RLHF_FIELD(TokenRewards<T>, logprob),
        STABLE_RLHF_FIELD(TokenRewards<T>, ref_logprob),
        STABLE_RLHF_FIELD(TokenRewards<T>, score),
        STABLE_RLHF_FIELD(TokenRewards<T>, cu_seqlens),
        STABLE_RLHF_FIELD(TokenRewards<T>, num_sequences),
        STABLE_RLHF_FIELD(TokenRewards<T>, tokens),
        STABLE_RLHF_FIELD(TokenRewards<T>, kl_coef),
        STABLE_RLHF_FIELD(TokenRewards<T>, kl_estimator),
        STABLE_RLHF_FIELD(TokenRewards<T>, clamp),
        STABLE_RLHF_FIELD(TokenRewards<T>, num_threads),
        STABLE_RLHF_FIELD(TokenRewards<T>, reward),
        STABLE_RLHF_FIELD(TokenRewards<T>, isa),
    }, [](const TokenRewards<T>& call) { return static_cast<int>(token_rewards(call)); });
}

}  // namespace

void bind_sequence(pybind11::module_& m) {
    bind_type<float>(m, "f32");
    bind_type<double>(m, "f64");
}

}  // namespace stable_rlhf
