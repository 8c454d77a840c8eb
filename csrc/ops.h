// The CPU kernels that bindings.cpp exposes. Plain pointers only: no Python, no torch headers, so one build serves
// every torch version. All arrays are contiguous; sizes and ranges are checked by the Python callers.
#pragma once

#include <cstdint>

namespace stable_rlhf {

// Generalised advantage estimation over packed sequences: sequence s is [cu_seqlens[s], cu_seqlens[s + 1]).
// bootstrap_value may be null (0 after the end). `decay` is gamma * lambda, rounded once by the caller as PyTorch does.
template <typename T>
void gae(const T* reward, const T* value, const int64_t* cu_seqlens, const T* bootstrap_value, int64_t num_sequences,
         T gamma, T decay, int num_threads, T* advantage, T* returns);

// Writes the ascending indices of the k best scores of each cluster to `out` (capacity n) and returns their number.
// Ties go to the lower index.
template <typename T>
int64_t topk_by_cluster(const T* score, const int64_t* cluster, int64_t n, int64_t num_clusters, int64_t k,
                        int num_threads, int64_t* out);

}  // namespace stable_rlhf
