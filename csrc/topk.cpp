// The k best scores of each cluster, in two passes over the rows: one counts the clusters, one keeps candidates.
//
// Candidates of a cluster are kept in a buffer of min(2k, its size) rows. A full buffer is cut to its best k, and the
// worst of these becomes a threshold that all but a few later rows fail: most of the second pass is one comparison a row.
// Each thread has a range of rows and buffers of its own; what they keep is merged under a total order of the rows, so
// that the result does not depend on the ranges.
#include "topk.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "parallel.h"

namespace stable_rlhf {
namespace {

constexpr double kDecided = 1e6;  // nanoseconds: num_threads is already the number for the whole

// A row as one number: the better row is the larger number. Score above, complement of the index below.
template <typename T>
struct Packing;

template <>
struct Packing<float> {
    using Row = uint64_t;
    using Raw = uint32_t;
};
template <>
struct Packing<double> {
    __extension__ using Row = unsigned __int128;
    using Raw = uint64_t;
};

template <typename T>
typename Packing<T>::Row pack(T score, int64_t index) {
    using Raw = typename Packing<T>::Raw;
    constexpr Raw sign = Raw(1) << (8 * sizeof(Raw) - 1);
    score += T(0);  // -0.0 is 0.0
    Raw raw;
    std::memcpy(&raw, &score, sizeof(raw));
    raw = raw & sign ? ~raw : raw | sign;
    return static_cast<typename Packing<T>::Row>(raw) << 32 | static_cast<uint32_t>(~index);
}

template <typename T>
T score_of(typename Packing<T>::Row row) {
    using Raw = typename Packing<T>::Raw;
    constexpr Raw sign = Raw(1) << (8 * sizeof(Raw) - 1);
    Raw raw = static_cast<Raw>(row >> 32);
    raw = raw & sign ? raw & ~sign : ~raw;
    T score;
    std::memcpy(&score, &raw, sizeof(score));
    return score;
}

template <typename Row>
int64_t index_of(Row row) {
    return static_cast<int64_t>(~static_cast<uint32_t>(row));
}

template <typename Row>
bool better(Row a, Row b) {
    return a > b;
}

template <typename T>
std::unique_ptr<T[]> uninitialised(int64_t n) {
    return std::unique_ptr<T[]>(new T[n]);
}

}  // namespace

template <typename T, typename Cluster>
int64_t topk_by_cluster(const T* score, const Cluster* cluster, int64_t n, int64_t num_clusters, int64_t k,
                        int num_threads, int64_t* out) {
    using Row = typename Packing<T>::Row;
    num_threads = threads_for(5.0 * static_cast<double>(n), num_threads);
    // A range is worth its thread, and its table of clusters, where it has many more rows than clusters.
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(num_threads, n / (65536 + 2 * num_clusters)));
    const int64_t words = (n + 63) / 64;
    const auto range_begin = [=](int64_t part) { return std::min(n, words * part / parts * 64); };

    // How many rows of each cluster each part has; then where its buffer begins, all parts of a cluster side by side.
    std::vector<uint32_t> size(parts * num_clusters, 0);
    std::atomic<bool> sound{true};
    parallel_for(parts, 1, kDecided, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t part = from; part < to; ++part) {
            uint32_t* own = size.data() + part * num_clusters;
            for (int64_t i = range_begin(part), end = range_begin(part + 1); i < end; ++i) {
                const auto c = static_cast<uint64_t>(static_cast<int64_t>(cluster[i]));
                if (c >= static_cast<uint64_t>(num_clusters)) {
                    sound = false;
                    return;
                }
                ++own[c];
            }
        }
    });
    if (!sound) return -1;

    const auto capacity = [=](int64_t rows) { return k < rows - k ? 2 * k : rows; };
    auto start = uninitialised<int64_t>(num_clusters * parts + 1);
    int64_t room = 0;
    for (int64_t c = 0; c < num_clusters; ++c) {
        for (int64_t part = 0; part < parts; ++part) {
            start[c * parts + part] = room;
            room += capacity(size[part * num_clusters + c]);
        }
    }
    start[num_clusters * parts] = room;
    auto candidate = uninitialised<Row>(room);
    std::vector<uint32_t> filled(parts * num_clusters, 0);
    std::vector<T> threshold(parts * num_clusters, std::numeric_limits<T>::quiet_NaN());

    parallel_for(parts, 1, kDecided, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t part = from; part < to; ++part) {
            T* bar = threshold.data() + part * num_clusters;
            uint32_t* fill = filled.data() + part * num_clusters;
            const uint32_t* rows = size.data() + part * num_clusters;
            for (int64_t i = range_begin(part), end = range_begin(part + 1); i < end; ++i) {
                const int64_t c = cluster[i];
                // A tie fails too: the k that reached the threshold have lower indices. NaN on either side passes.
                if (score[i] <= bar[c]) continue;
                if (std::isnan(score[i])) {
                    sound = false;
                    return;
                }
                const int64_t space = capacity(rows[c]);
                if (space == 0) continue;
                Row* buffer = candidate.get() + start[c * parts + part];
                if (fill[c] == space) {
                    std::nth_element(buffer, buffer + (k - 1), buffer + space, better<Row>);
                    bar[c] = score_of<T>(buffer[k - 1]);
                    fill[c] = static_cast<uint32_t>(k);
                    if (score[i] <= bar[c]) continue;
                }
                buffer[fill[c]++] = pack(score[i], i);
            }
        }
    });
    if (!sound) return -1;

    // One bit a row, set for those kept: read in order they are the ascending indices.
    std::vector<std::atomic<uint64_t>> kept(words);
    parallel_for(num_clusters, 64, kDecided, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t c = from; c < to; ++c) {
            Row* first = candidate.get() + start[c * parts];
            Row* last = first;
            for (int64_t part = 0; part < parts; ++part) {
                const Row* own = candidate.get() + start[c * parts + part];
                last = std::copy(own, own + filled[part * num_clusters + c], last);
            }
            if (last - first > k) {
                std::nth_element(first, first + k, last, better<Row>);
                last = first + k;
            }
            for (const Row* row = first; row < last; ++row) {
                const int64_t i = index_of(*row);
                kept[i / 64].fetch_or(uint64_t(1) << (i % 64), std::memory_order_relaxed);
            }
        }
    });

    int64_t number = 0;
    for (int64_t w = 0; w < words; ++w) {
        for (uint64_t bits = kept[w].load(std::memory_order_relaxed); bits; bits &= bits - 1) {
            out[number++] = w * 64 + __builtin_ctzll(bits);
        }
    }
    return number;
}

namespace {

template <typename T>
void bind_type(pybind11::module_& m, const char* name) {
    m.def(name,
          [](std::uintptr_t score, std::uintptr_t cluster, bool narrow, int64_t n, int64_t num_clusters, int64_t k,
             int num_threads, std::uintptr_t out) {
              const T* const scores = reinterpret_cast<const T*>(score);
              int64_t* const kept = reinterpret_cast<int64_t*>(out);
              const auto run = [&](const auto* clusters) {
                  return topk_by_cluster(scores, clusters, n, num_clusters, k, num_threads, kept);
              };
              return narrow ? run(reinterpret_cast<const int32_t*>(cluster))
                            : run(reinterpret_cast<const int64_t*>(cluster));
          },
          pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace

void bind_topk(pybind11::module_& m) {
    bind_type<float>(m, "topk_by_cluster_f32");
    bind_type<double>(m, "topk_by_cluster_f64");
}

}  // namespace stable_rlhf
