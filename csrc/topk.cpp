// The k best scores of each cluster: a counting sort into clusters, then a selection inside each.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace stable_rlhf {

template <typename T>
int64_t topk_by_cluster(const T* score, const int64_t* cluster, int64_t n, int64_t num_clusters, int64_t k,
                        int num_threads, int64_t* out) {
    std::vector<int64_t> start(num_clusters + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++start[cluster[i] + 1];
    for (int64_t c = 0; c < num_clusters; ++c) start[c + 1] += start[c];

    std::vector<int64_t> members(n);
    {
        std::vector<int64_t> next(start.begin(), start.end() - 1);
        for (int64_t i = 0; i < n; ++i) members[next[cluster[i]]++] = i;
    }

    // nth_element needs a strict weak order; the index makes it total, so the kept set is unique.
    const auto better = [score](int64_t a, int64_t b) {
        return score[a] > score[b] || (score[a] == score[b] && a < b);
    };
    parallel_for(num_clusters, 8, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
            if (start[c + 1] - start[c] > k) {
                const auto begin = members.begin();
                std::nth_element(begin + start[c], begin + start[c] + k, begin + start[c + 1], better);
            }
        }
    });

    int64_t kept = 0;
    for (int64_t c = 0; c < num_clusters; ++c) {
        const int64_t count = std::min(k, start[c + 1] - start[c]);
        std::copy_n(members.begin() + start[c], count, out + kept);
        kept += count;
    }
    std::sort(out, out + kept);
    return kept;
}

template int64_t topk_by_cluster<float>(const float*, const int64_t*, int64_t, int64_t, int64_t, int, int64_t*);
template int64_t topk_by_cluster<double>(const double*, const int64_t*, int64_t, int64_t, int64_t, int, int64_t*);

}  // namespace stable_rlhf
