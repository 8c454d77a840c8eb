// The k best scores of each cluster.
#pragma once

#include <cstdint>

namespace stable_rlhf {

// Writes the ascending indices of the k best scores of each cluster to `out` (room for min(n, k num_clusters)) and returns
// their number. Ties go to the lower index; the result is the same for any number of threads. n < 2^32.
// Returns -1 where a cluster is outside [0, num_clusters) or a score is NaN.
template <typename T, typename Cluster>
int64_t topk_by_cluster(const T* score, const Cluster* cluster, int64_t n, int64_t num_clusters, int64_t k,
                        int num_threads, int64_t* out);

}  // namespace stable_rlhf
