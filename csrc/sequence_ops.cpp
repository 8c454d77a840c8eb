// Generalised advantage estimation (Schulman et al. 2016, eq. 16) on packed sequences.
#include "ops.h"
#include "parallel.h"

namespace stable_rlhf {

template <typename T>
void gae(const T* reward, const T* value, const int64_t* cu_seqlens, const T* bootstrap_value, int64_t num_sequences,
         T gamma, T decay, int num_threads, T* advantage, T* returns) {
    parallel_for(num_sequences, 16, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s) {
            T next_value = bootstrap_value ? bootstrap_value[s] : T(0);
            T running = T(0);
            for (int64_t t = cu_seqlens[s + 1] - 1; t >= cu_seqlens[s]; --t) {
                // The order of operations of the PyTorch reference, so that both give the same bits.
                const T delta = (reward[t] + gamma * next_value) - value[t];
                running = delta + decay * running;
                advantage[t] = running;
                returns[t] = running + value[t];
                next_value = value[t];
            }
        }
    });
}

template void gae<float>(const float*, const float*, const int64_t*, const float*, int64_t, float, float, int, float*,
                         float*);
template void gae<double>(const double*, const double*, const int64_t*, const double*, int64_t, double, double, int,
                          double*, double*);

}  // namespace stable_rlhf
