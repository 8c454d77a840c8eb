// Shares a product out to threads. Of the two sides the smaller one is packed once for all of them; each takes blocks of
// the larger one, packs them, and makes all of their products while they are in its cache.
#include "wide_product.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "fields.h"
#include "parallel.h"
#include "room.h"

namespace stable_rlhf {
namespace {

constexpr int64_t kPairs = 256;          // of depth at a time: a panel of 16 KiB
constexpr int64_t kBlock = 6 * kLanes;   // of the larger side
constexpr int64_t kShared = 8 << 20;     // bytes of the smaller side that are packed at a time
constexpr double kFlops = 200;           // of a thread in a nanosecond
constexpr int64_t kStretch = 512 << 10;  // bytes of a sum that a thread keeps

bool available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return avx512bf16::compiled && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

void wide_product(const WideProduct& call) {
    if (!available()) throw std::runtime_error("wide_product: this processor or this build has no AVX-512 BF16");
    const Lanes a{call.a, call.a_row, call.a_column, call.m, nullptr};
    const Lanes b{call.b, call.b_column, call.b_row, call.n, call.b_places};
    const bool by_rows = call.m >= call.n;
    const Lanes &small = by_rows ? b : a, &large = by_rows ? a : b;
    const int64_t panels = (small.lanes + kLanes - 1) / kLanes, pairs = (call.k + 1) / 2;
    const int64_t bytes = panels * kLanes * kPairs * 4;
    const int64_t step = std::max<int64_t>(1, kShared / bytes) * kPairs;
    thread_local std::vector<uint32_t> kept;
    // [blocks of kPairs, panels, pairs of the block, kLanes]
    uint32_t* const packed = room(kept, panels * kLanes * std::min(step, pairs));

    for (int64_t begin = 0; begin < pairs; begin += step) {
        const int64_t end = std::min(pairs, begin + step);
        const auto each_block = [&](const auto& work) {
            for (int64_t from = begin; from < end; from += kPairs) work(from, std::min(end, from + kPairs));
        };
        const double depth = 2.0 * static_cast<double>(end - begin);
        parallel_for(panels, 1, 0.1 * kLanes * depth, call.num_threads, [&](int64_t first, int64_t last) {
            for (int64_t panel = first; panel < last; ++panel) {
                each_block([&](int64_t from, int64_t to) {
                    uint32_t* out = packed + ((from - begin) * panels + panel * (to - from)) * kLanes;
                    avx512bf16::pack(small, panel * kLanes, 2 * from, std::min(call.k, 2 * to), out);
                });
            }
        });
        const double each = 2.0 * depth * static_cast<double>(small.lanes) / kFlops;
        parallel_for(large.lanes, kBlock, each, call.num_threads, [&](int64_t first, int64_t last) {
            thread_local std::vector<uint32_t> kept_by_this_thread;
            uint32_t* const own = room(kept_by_this_thread, kBlock * kPairs);
            for (int64_t at = first; at < last; at += kBlock) {
                const int64_t lanes = std::min(kBlock, last - at);
                each_block([&](int64_t from, int64_t to) {
                    const int64_t panel = (to - from) * kLanes;
                    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
                        avx512bf16::pack(large, at + lane, 2 * from, std::min(call.k, 2 * to), own + lane / kLanes * panel);
                    }
                    const uint32_t* shared = packed + (from - begin) * panels * kLanes;
                    avx512bf16::Block block{};
                    block.panel = panel, block.pairs = to - from, block.by_rows = by_rows, block.stride = call.n;
                    block.add = !call.fresh || from > 0;
                    block.a = by_rows ? own : shared, block.b = by_rows ? shared : own;
                    block.m = by_rows ? lanes : call.m, block.n = by_rows ? call.n : lanes;
                    block.places = call.total_places ? call.total_places + (by_rows ? at : 0) : nullptr;
                    block.total = call.total + (!by_rows ? at : call.total_places ? 0 : at * call.n);
                    avx512bf16::block(block);
                });
            }
        });
    }
}

// A part, and where its b is packed: [blocks of kPairs, panels, pairs of the block, kLanes].
struct PackedPart : WideSum::Part {
    uint32_t* packed;

    int64_t pairs() const { return (k + 1) / 2; }
    const int64_t* rows() const { return reinterpret_cast<const int64_t*>(places); }
};

void wide_sum(const WideSum& call) {
    if (!available()) throw std::runtime_error("wide_sum: this processor or this build has no AVX-512 BF16");
    const int64_t panels = (call.n + kLanes - 1) / kLanes;
    std::vector<PackedPart> parts;
    int64_t numbers = 0;
    double flops = 0;
    for (int64_t i = 0; i < call.num_parts; ++i) {
        PackedPart part{reinterpret_cast<const WideSum::Part*>(call.parts)[i], nullptr};
        numbers += part.pairs() * panels * kLanes;
        flops += 2.0 * static_cast<double>(part.k) * static_cast<double>(part.m) * static_cast<double>(call.n);
        parts.push_back(part);
    }
    thread_local std::vector<uint32_t> kept;
    std::vector<uint32_t> large;  // given back
    uint32_t* next = room(4 * numbers <= kShared ? kept : large, numbers);
    for (PackedPart& part : parts) {
        part.packed = next;
        next += part.pairs() * panels * kLanes;
    }
    const double rows = static_cast<double>(std::max<int64_t>(1, call.rows));
    for (const PackedPart& part : parts) {
        const Lanes b{reinterpret_cast<const uint16_t*>(part.b), 1, part.b_row, call.n, nullptr};
        parallel_for(panels, 1, 0.1 * kLanes * static_cast<double>(part.k), call.num_threads, [&](int64_t first, int64_t last) {
            for (int64_t panel = first; panel < last; ++panel) {
                for (int64_t from = 0; from < part.pairs(); from += kPairs) {
                    const int64_t to = std::min(part.pairs(), from + kPairs);
                    uint32_t* const out = part.packed + (from * panels + panel * (to - from)) * kLanes;
                    avx512bf16::pack(b, panel * kLanes, 2 * from, std::min(part.k, 2 * to), out);
                }
            }
        });
    }
    const int64_t step = std::max(4 * kLanes, kStretch / (4 * call.n));
    parallel_for(call.rows, step, flops / rows / kFlops, call.num_threads, [&](int64_t first, int64_t last) {
        thread_local std::vector<float> kept_sums;
        thread_local std::vector<uint32_t> kept_lanes;
        std::vector<int64_t> places(kBlock);
        float* const sums = room(kept_sums, step * call.n);
        uint32_t* const own = room(kept_lanes, kBlock * kPairs);
        for (int64_t at = first; at < last; at += step) {
            const int64_t here = std::min(step, last - at);
            std::fill_n(sums, here * call.n, 0.0f);
            for (const PackedPart& part : parts) {
                const auto place = [&](int64_t row) {  // of the first of its columns from this row on
                    return part.rows() ? std::lower_bound(part.rows(), part.rows() + part.m, row) - part.rows() : row;
                };
                const Lanes a{reinterpret_cast<const uint16_t*>(part.a), 1, part.a_row, place(at + here), nullptr};
                for (int64_t lane = place(at); lane < a.lanes; lane += kBlock) {
                    const int64_t lanes = std::min(kBlock, a.lanes - lane);
                    for (int64_t i = 0; i < lanes; ++i) places[i] = (part.rows() ? part.rows()[lane + i] : lane + i) - at;
                    for (int64_t from = 0; from < part.pairs(); from += kPairs) {
                        avx512bf16::Block block{};
                        block.pairs = std::min(part.pairs() - from, kPairs), block.panel = block.pairs * kLanes;
                        const int64_t end = std::min(part.k, 2 * (from + block.pairs));
                        for (int64_t i = 0; i < lanes; i += kLanes) {
                            avx512bf16::pack(a, lane + i, 2 * from, end, own + i / kLanes * block.panel);
                        }
                        block.a = own, block.b = part.packed + from * panels * kLanes;
                        block.m = lanes, block.n = call.n, block.by_rows = true, block.add = true;
                        block.total = sums, block.stride = call.n, block.places = places.data();
                        avx512bf16::block(block);
                    }
                }
            }
            avx512bf16::narrow(sums, here * call.n, call.out + at * call.n);
        }
    });
}

}  // namespace

void bind_wide_product(pybind11::module_& m) {
    m.def("has_wide_product", &available);
    define<WideProduct>(m, "wide_product", {
        STABLE_RLHF_FIELD(WideProduct, a),
        STABLE_RLHF_FIELD(WideProduct, b),
        STABLE_RLHF_FIELD(WideProduct, total),
        STABLE_RLHF_FIELD(WideProduct, b_places),
        STABLE_RLHF_FIELD(WideProduct, total_places),
        STABLE_RLHF_FIELD(WideProduct, m),
        STABLE_RLHF_FIELD(WideProduct, n),
        STABLE_RLHF_FIELD(WideProduct, k),
        STABLE_RLHF_FIELD(WideProduct, a_row),
        STABLE_RLHF_FIELD(WideProduct, a_column),
        STABLE_RLHF_FIELD(WideProduct, b_row),
        STABLE_RLHF_FIELD(WideProduct, b_column),
        STABLE_RLHF_FIELD(WideProduct, fresh),
        STABLE_RLHF_FIELD(WideProduct, num_threads),
    }, wide_product);
    define<WideSum>(m, "wide_sum", {
        STABLE_RLHF_FIELD(WideSum, parts),
        STABLE_RLHF_FIELD(WideSum, out),
        STABLE_RLHF_FIELD(WideSum, num_parts),
        STABLE_RLHF_FIELD(WideSum, rows),
        STABLE_RLHF_FIELD(WideSum, n),
        STABLE_RLHF_FIELD(WideSum, num_threads),
    }, wide_sum);
}

}  // namespace stable_rlhf
