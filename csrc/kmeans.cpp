// A block of rows in k-means: who is nearest, what that changes in the sums, how far rows are, and their sum.
#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "fields.h"
#include "isa.h"
#include "parallel.h"

namespace stable_rlhf {
namespace {

constexpr int64_t kRows = 256;
constexpr double kElement = 0.15;  // nanoseconds of one thread

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
    double* sums;         // [touched, d] sum of rows that came minus sum of rows that went; of `sum` [d], added to
    // Of `distances` alone, which takes rows, scale and labels too (null: the only centroid):
    const float* centroids;  // [c, d]
    float* out;              // [n]
    // Of `distances` and `sum`, whose n may be that of all rows:
    int num_threads;
    int64_t block;           // rows that `sum` adds before it adds them to others
};

// BLAS's product, by columns: c = a b.
using Gemm = void (*)(const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,
                      const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                      const float* beta, float* c, const int* ldc);

// All rows once, in blocks, whose products with some centroids something is then made of.
struct Pass {
    const float* rows;    // [n, d]
    const float* offset;  // [d] to subtract from every row, or null
    const float* matrix;  // [d, c]
    const float* half;    // [c] or null
    int64_t n, d, c, block;
    void* gemm;           // a Gemm that takes one thread
    int num_threads;
    const char* isa;
    // Of `pass`:
    const float* scale;   // [n] or null
    int32_t* labels;      // [n]
    double* sums;         // [c, d] of the rows of each cluster; null: the labels alone are wanted
    int64_t* sizes;       // [c]
    // Of `approach`, whose half is that of the centroids' squared lengths:
    const float* own;     // [c] squared lengths
    const float* lengths;  // [n]
    float* squared;       // [n] squared distance to the nearest centroid so far
};

// Centroids as a pass takes them: with m their mean, c - m by columns and (c - m) (c + m) / 2.
struct Centroids {
    const float* centroids;  // [c, d]
    int64_t c, d;
    float* matrix;           // [d, c]
    float* half;             // [c], or null
};

void nearest(const Block& block) {
    kernels(block.isa).nearest(block.scores, block.half, block.n, block.c, block.labels);
}

// The number of touched clusters. Rows that came are added before rows that went are subtracted, both in order. `now`
// has room for n, `slots` for c.
int64_t moves_with(const Block& block, int32_t* now, int32_t* slots) {
    const Kernels& chosen = kernels(block.isa);
    std::fill_n(slots, block.c, -1);
    chosen.nearest(block.scores, block.half, block.n, block.c, now);
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
    std::copy_n(now, block.n, block.labels);
    return number;
}

int64_t moves(const Block& block) {
    std::vector<int32_t> now(block.n), slots(block.c);
    return moves_with(block, now.data(), slots.data());
}

void distances(const Block& block) {
    const Kernels& chosen = kernels(block.isa);
    parallel_for(block.n, kRows, kElement * static_cast<double>(block.d), block.num_threads, [&](int64_t begin, int64_t end) {
        chosen.distances(block.rows + begin * block.d, block.scale ? block.scale + begin : nullptr, block.centroids,
                         block.labels ? block.labels + begin : nullptr, end - begin, block.d, block.out + begin);
    }, kWorthThreadsBetweenProducts);
}

// Block by block, whoever adds them: the sum of one thread.
void sum(const Block& block) {
    const Kernels& chosen = kernels(block.isa);
    const int64_t blocks = (block.n + block.block - 1) / block.block;
    std::vector<double> parts(blocks * block.d);
    const double each = kElement * static_cast<double>(block.d * block.block);
    parallel_for(blocks, 1, each, block.num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * block.block; i < std::min(end * block.block, block.n); ++i) {
            chosen.add_row(block.rows + i * block.d, 1.0, block.d, parts.data() + i / block.block * block.d);
        }
    }, kWorthThreadsBetweenProducts);
    for (int64_t at = 0; at < blocks; ++at) {
        for (int64_t k = 0; k < block.d; ++k) block.sums[k] += parts[at * block.d + k];
    }
}

// Adds what a block changed in `number` clusters to the sums and sizes of all.
void apply(const Block& block, int64_t number, double* sums, int64_t* sizes) {
    for (int64_t i = 0; i < number; ++i) {
        const double* const from = block.sums + i * block.d;
        double* const to = sums + block.touched[i] * block.d;
        for (int64_t k = 0; k < block.d; ++k) to[k] += from[k];
        sizes[block.touched[i]] += block.counts[i];
    }
}

void prepare(const Centroids& call) {
    std::vector<double> mean(call.d);
    for (int64_t j = 0; j < call.c; ++j) {
        for (int64_t k = 0; k < call.d; ++k) mean[k] += call.centroids[j * call.d + k];
    }
    for (double& m : mean) m /= static_cast<double>(call.c);
    for (int64_t j = 0; j < call.c; ++j) {
        const float* const row = call.centroids + j * call.d;
        double sum = 0;
        for (int64_t k = 0; k < call.d; ++k) {
            const double wide = row[k], apart = wide - mean[k];
            call.matrix[k * call.c + j] = static_cast<float>(apart);
            sum += apart * (wide + mean[k]);
        }
        if (call.half) call.half[j] = static_cast<float>(sum / 2);
    }
}

std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }  // not filled

// What a thread needs beside the rows.
struct Scratch {
    explicit Scratch(const Pass& pass)
        : scores(floats(pass.block * pass.c)), apart(floats(pass.offset ? pass.block * pass.d : 0)), labels(pass.block),
          slots(pass.c), touched(std::min(pass.c, 2 * pass.block)), counts(touched.size()),
          sums(new double[pass.sums ? touched.size() * pass.d : 0]) {}
    std::unique_ptr<float[]> scores, apart;
    std::vector<int32_t> labels, slots, touched;
    std::vector<int64_t> counts;
    std::unique_ptr<double[]> sums;
};

// Calls body(block's number, block, scratch) for every block, on the pass's threads.
template <typename Body>
void over_blocks(const Pass& pass, const Body& body) {
    const int64_t blocks = (pass.n + pass.block - 1) / pass.block;
    const int threads = static_cast<int>(std::min<int64_t>(std::max(pass.num_threads, 1), blocks));
    std::vector<Scratch> scratches;
    for (int i = 0; i < threads; ++i) scratches.emplace_back(pass);  // here, where an error has somebody to hear it
    std::atomic<int64_t> next{0};
    std::atomic<int> begun{0};
    auto work = [&] {
        const int mine = begun++;
        if (mine >= threads) return;  // fewer blocks than threads, whose number stays the same (parallel.h)
        Scratch& scratch = scratches[mine];
        for (int64_t number = next++; number < blocks; number = next++) {
            const int64_t begin = number * pass.block;
            Block block{};
            block.rows = pass.rows + begin * pass.d;
            block.scores = scratch.scores.get();
            block.half = pass.half;
            block.n = std::min(pass.block, pass.n - begin);
            block.c = pass.c;
            block.d = pass.d;
            block.isa = pass.isa;
            if (pass.offset) {
                float* const apart = scratch.apart.get();
                for (int64_t i = 0; i < block.n; ++i) {
                    const float* const row = block.rows + i * pass.d;
                    for (int64_t k = 0; k < pass.d; ++k) apart[i * pass.d + k] = row[k] - pass.offset[k];
                }
                block.rows = apart;
            }
            const int c = static_cast<int>(pass.c), n = static_cast<int>(block.n), d = static_cast<int>(pass.d);
            const float one = 1.0f, zero = 0.0f;
            reinterpret_cast<Gemm>(pass.gemm)("N", "N", &c, &n, &d, &one, pass.matrix, &c, block.rows, &d, &zero,
                                              scratch.scores.get(), &c);
            body(number, block, scratch);
        }
    };
    if (threads <= 1) {
        if (blocks > 0) work();
    } else {
        run_on_threads(pass.num_threads, [](void* it) { (*static_cast<decltype(work)*>(it))(); }, &work);
    }
}

// Whether a row changed its cluster. Each block adds to the sums in its turn, so that they are those of one thread.
bool pass(const Pass& pass) {
    std::atomic<int64_t> turn{0};
    bool any = false;
    over_blocks(pass, [&](int64_t number, Block& block, Scratch& scratch) {
        block.labels = pass.labels + number * pass.block;
        if (pass.sums == nullptr) return nearest(block);
        block.scale = pass.scale ? pass.scale + number * pass.block : nullptr;
        block.touched = scratch.touched.data();
        block.counts = scratch.counts.data();
        block.sums = scratch.sums.get();
        const int64_t changed = moves_with(block, scratch.labels.data(), scratch.slots.data());
        while (turn.load(std::memory_order_acquire) != number) std::this_thread::yield();
        apply(block, changed, pass.sums, pass.sizes);
        any = any || changed > 0;
        turn.store(number + 1, std::memory_order_release);
    });
    return any;
}

// squared[i] becomes the squared distance of row i to the nearest of some more centroids where that is smaller. What
// rounding leaves of equal rows is none.
void approach(const Pass& pass) {
    over_blocks(pass, [&](int64_t number, Block& block, Scratch& scratch) {
        block.labels = scratch.labels.data();
        nearest(block);
        for (int64_t i = 0; i < block.n; ++i) {
            const int64_t row = number * pass.block + i, label = block.labels[i];
            const float apart = (pass.own[label] - 2.0f * block.scores[i * pass.c + label]) + pass.lengths[row];
            pass.squared[row] = std::min(pass.squared[row], apart < 2e-6f * pass.lengths[row] ? 0.0f : apart);
        }
    });
}

}  // namespace

void bind_kmeans(pybind11::module_& m) {
    const std::initializer_list<Field<Block>> fields = {
        STABLE_RLHF_FIELD(Block, scores),  STABLE_RLHF_FIELD(Block, half),   STABLE_RLHF_FIELD(Block, n),
        STABLE_RLHF_FIELD(Block, c),       STABLE_RLHF_FIELD(Block, labels), STABLE_RLHF_FIELD(Block, isa),
        STABLE_RLHF_FIELD(Block, rows),    STABLE_RLHF_FIELD(Block, scale),  STABLE_RLHF_FIELD(Block, d),
        STABLE_RLHF_FIELD(Block, touched), STABLE_RLHF_FIELD(Block, counts), STABLE_RLHF_FIELD(Block, sums),
        STABLE_RLHF_FIELD(Block, centroids), STABLE_RLHF_FIELD(Block, out),
        STABLE_RLHF_FIELD(Block, num_threads), STABLE_RLHF_FIELD(Block, block),
    };
    define<Block>(m, "kmeans_nearest", fields, nearest);
    define<Block>(m, "kmeans_moves", fields, moves);
    define<Block>(m, "kmeans_distances", fields, distances);
    define<Block>(m, "kmeans_sum", fields, sum);
    const std::initializer_list<Field<Pass>> of_pass = {
        STABLE_RLHF_FIELD(Pass, rows),    STABLE_RLHF_FIELD(Pass, offset), STABLE_RLHF_FIELD(Pass, matrix),
        STABLE_RLHF_FIELD(Pass, half),    STABLE_RLHF_FIELD(Pass, n),      STABLE_RLHF_FIELD(Pass, d),
        STABLE_RLHF_FIELD(Pass, c),       STABLE_RLHF_FIELD(Pass, block),  STABLE_RLHF_FIELD(Pass, gemm),
        STABLE_RLHF_FIELD(Pass, num_threads), STABLE_RLHF_FIELD(Pass, isa), STABLE_RLHF_FIELD(Pass, scale),
        STABLE_RLHF_FIELD(Pass, labels),  STABLE_RLHF_FIELD(Pass, sums),   STABLE_RLHF_FIELD(Pass, sizes),
        STABLE_RLHF_FIELD(Pass, own),     STABLE_RLHF_FIELD(Pass, lengths), STABLE_RLHF_FIELD(Pass, squared),
    };
    define<Centroids>(m, "kmeans_prepare", {
        STABLE_RLHF_FIELD(Centroids, centroids), STABLE_RLHF_FIELD(Centroids, c), STABLE_RLHF_FIELD(Centroids, d),
        STABLE_RLHF_FIELD(Centroids, matrix), STABLE_RLHF_FIELD(Centroids, half),
    }, prepare);
    define<Pass>(m, "kmeans_pass", of_pass, pass);
    define<Pass>(m, "kmeans_approach", of_pass, approach);
}

}  // namespace stable_rlhf
