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
}

}  // namespace stable_rlhf
