// One block of rows in an iteration of Lloyd's algorithm: who is nearest, and what that changes in the sums.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "isa.h"

namespace stable_rlhf {
namespace {

struct Block {
    const float* scores;  // [n, c] products with the centroids
    const float* half;    // [c] to subtract, or null
    const float* rows;    // [n, d]
    const float* scale;   // [n] what a row counts, or null
    int64_t n, c, d;
    int32_t* labels;      // [n] the clusters before, -1 for none; the clusters now
    int32_t* touched;     // the clusters whose rows changed; room for the smaller of c and 2 n, like the next two
    int64_t* counts;      // [touched] rows more
    double* sums;         // [touched, d] sum of rows that came minus sum of rows that went
};

// The number of touched clusters. Rows that came are added before rows that went are subtracted, both in order.
int64_t moves(const Block& block, const Kernels& kernels) {
    std::vector<int32_t> now(block.n), slots(block.c, -1);
    kernels.nearest(block.scores, block.half, block.n, block.c, now.data());
    int64_t number = 0;
    const auto add = [&](int32_t cluster, int64_t row, int sign) {
        int32_t& slot = slots[cluster];
        if (slot < 0) {
            slot = static_cast<int32_t>(number++);
            block.touched[slot] = cluster;
            block.counts[slot] = 0;
            std::fill_n(block.sums + slot * block.d, block.d, 0.0);
        }
        block.counts[slot] += sign;
        const double weight = block.scale ? block.scale[row] : 1.0;
        kernels.add_row(block.rows + row * block.d, sign * weight, block.d, block.sums + slot * block.d);
    };
    for (int64_t i = 0; i < block.n; ++i) {
        if (now[i] != block.labels[i]) add(now[i], i, 1);
    }
    for (int64_t i = 0; i < block.n; ++i) {
        if (now[i] != block.labels[i] && block.labels[i] >= 0) add(block.labels[i], i, -1);
    }
    std::copy(now.begin(), now.end(), block.labels);
    return number;
}

}  // namespace

void bind_kmeans(pybind11::module_& m) {
    const auto floats = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
    m.def("kmeans_nearest",
          [=](std::uintptr_t scores, std::uintptr_t half, int64_t n, int64_t c, std::uintptr_t labels,
              const std::string& isa) {
              kernels(isa.c_str()).nearest(floats(scores), floats(half), n, c, reinterpret_cast<int32_t*>(labels));
          },
          pybind11::call_guard<pybind11::gil_scoped_release>());
    m.def("kmeans_moves",
          [=](std::uintptr_t scores, std::uintptr_t half, std::uintptr_t rows, std::uintptr_t scale, int64_t n,
              int64_t c, int64_t d, std::uintptr_t labels, std::uintptr_t touched, std::uintptr_t counts,
              std::uintptr_t sums, const std::string& isa) {
              return moves({floats(scores), floats(half), floats(rows), floats(scale), n, c, d,
                            reinterpret_cast<int32_t*>(labels), reinterpret_cast<int32_t*>(touched),
                            reinterpret_cast<int64_t*>(counts), reinterpret_cast<double*>(sums)},
                           kernels(isa.c_str()));
          },
          pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace stable_rlhf
