// One block of rows in an iteration of Lloyd's algorithm: who is nearest, and what that changes in the sums.
#include <algorithm>
#include <vector>

#include "fields.h"
#include "isa.h"

namespace stable_rlhf {
namespace {

struct Block {
    const float* scores;  // [n, c] products with the centroids
    const float* half;    // [c] to subtract, or null
    int64_t n, c;
    int32_t* labels;      // [n] the clusters before, -1 for none; the clusters now
    const char* isa;
    // Of `moves` alone:
    const float* rows;    // [n, d]
    const float* scale;   // [n] what a row counts, or null
    int64_t d;
    int32_t* touched;     // the clusters whose rows changed; room for the smaller of c and 2 n, like the next two
    int64_t* counts;      // [touched] rows more
    double* sums;         // [touched, d] sum of rows that came minus sum of rows that went
};

void nearest(const Block& block) {
    kernels(block.isa).nearest(block.scores, block.half, block.n, block.c, block.labels);
}

// The number of touched clusters. Rows that came are added before rows that went are subtracted, both in order.
int64_t moves(const Block& block) {
    const Kernels& chosen = kernels(block.isa);
    std::vector<int32_t> now(block.n), slots(block.c, -1);
    chosen.nearest(block.scores, block.half, block.n, block.c, now.data());
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
        chosen.add_row(block.rows + row * block.d, sign * weight, block.d, block.sums + slot * block.d);
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
    const std::initializer_list<Field<Block>> fields = {
        STABLE_RLHF_FIELD(Block, scores),  STABLE_RLHF_FIELD(Block, half),   STABLE_RLHF_FIELD(Block, n),
        STABLE_RLHF_FIELD(Block, c),       STABLE_RLHF_FIELD(Block, labels), STABLE_RLHF_FIELD(Block, isa),
        STABLE_RLHF_FIELD(Block, rows),    STABLE_RLHF_FIELD(Block, scale),  STABLE_RLHF_FIELD(Block, d),
        STABLE_RLHF_FIELD(Block, touched), STABLE_RLHF_FIELD(Block, counts), STABLE_RLHF_FIELD(Block, sums),
    };
    define<Block>(m, "kmeans_nearest", fields, nearest);
    define<Block>(m, "kmeans_moves", fields, moves);
}

}  // namespace stable_rlhf
