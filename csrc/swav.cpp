// Shares rows out to threads in blocks, and adds what the blocks found in their order.
#include "swav.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "fields.h"
#include "isa.h"
#include "parallel.h"

namespace stable_rlhf {
namespace {

constexpr int64_t kBlock = 64;  // rows; fixed, so that sums do not depend on the number of threads

}  // namespace

void swav_log_sums(const Swav& call) {
    const Kernels& chosen = kernels(call.isa);
    const int64_t blocks = (call.rows + kBlock - 1) / kBlock, padded = swav_padded(call.prototypes);
    std::vector<float> parts(2 * blocks * 2 * padded);  // [view, block, largest and sum, padded]
    const double scores = static_cast<double>(kBlock * call.prototypes);
    parallel_for(2 * blocks, 1, 2.0 * scores, call.num_threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(2 * padded);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % blocks * kBlock, last = std::min(first + kBlock, call.rows);
            float* part = parts.data() + task * 2 * padded;
            chosen.swav_columns(call, task / blocks, first, last, part, part + padded, scratch.data());
        }
    }, kWorthThreadsBetweenProducts);
    for (int64_t view = 0; view < 2; ++view) {
        for (int64_t k = 0; k < call.prototypes; ++k) {
            const float* part = parts.data() + view * blocks * 2 * padded + k;
            double top = -HUGE_VAL, sum = 0.0;
            // Not std::fmax, over which g++ 12 for aarch64 fails with an internal error of its vectoriser.
            for (int64_t b = 0; b < blocks; ++b) top = std::max<double>(top, part[b * 2 * padded]);
            for (int64_t b = 0; b < blocks; ++b) {
                sum += double(part[b * 2 * padded + padded]) * std::exp(part[b * 2 * padded] - top);
            }
            call.log_sums[view * call.prototypes + k] = float(top + std::log(sum));
        }
    }
}

void swav_balance(const Swav& call) {
    const Kernels& chosen = kernels(call.isa);
    const int64_t blocks = (call.rows + kBlock - 1) / kBlock, padded = swav_padded(call.prototypes);
    std::vector<float> parts(2 * blocks * padded);  // [view, block, padded]
    const double scores = static_cast<double>(kBlock * call.prototypes);
    for (int64_t step = 0; step < call.iterations; ++step) {
        parallel_for(2 * blocks, 1, (step ? 0.1 : 1.0) * scores, call.num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t first = task % blocks * kBlock, last = std::min(first + kBlock, call.rows);
                float* part = parts.data() + task * padded;
                (step ? chosen.swav_codes : chosen.swav_masses)(call, task / blocks, first, last, part);
            }
        }, kWorthThreadsBetweenProducts);
        for (int64_t view = 0; view < 2; ++view) {
            for (int64_t k = 0; k < padded; ++k) {
                double sum = 0.0;
                for (int64_t b = 0; b < blocks; ++b) sum += parts[(view * blocks + b) * padded + k];
                call.weights[view * padded + k] = k < call.prototypes ? float(1.0 / sum) : 0.0f;
            }
        }
    }
}

double swav_loss(const Swav& call) {
    const Kernels& chosen = kernels(call.isa);
    const int64_t blocks = (call.rows + kBlock - 1) / kBlock;
    std::vector<double> parts(blocks);
    const double scores = 2.0 * static_cast<double>(kBlock * call.prototypes);  // of both views
    parallel_for(blocks, 1, 6.0 * scores, call.num_threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(4 * swav_padded(call.prototypes));
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * kBlock, last = std::min(first + kBlock, call.rows);
            parts[block] = chosen.swav_rows(call, first, last, scratch.data());
        }
    }, kWorthThreadsBetweenProducts);
    double loss = 0.0;
    for (const double part : parts) loss += part;
    return loss;
}

void bind_swav(pybind11::module_& m) {
    const std::initializer_list<Field<Swav>> fields = {
        STABLE_RLHF_FIELD(Swav, scores),
        STABLE_RLHF_FIELD(Swav, rows),
        STABLE_RLHF_FIELD(Swav, prototypes),
        STABLE_RLHF_FIELD(Swav, potential),
        STABLE_RLHF_FIELD(Swav, inverse_epsilon),
        STABLE_RLHF_FIELD(Swav, inverse_temperature),
        STABLE_RLHF_FIELD(Swav, scale),
        STABLE_RLHF_FIELD(Swav, gradient),
        STABLE_RLHF_FIELD(Swav, log_sums),
        STABLE_RLHF_FIELD(Swav, mass),
        STABLE_RLHF_FIELD(Swav, weights),
        STABLE_RLHF_FIELD(Swav, iterations),
        STABLE_RLHF_FIELD(Swav, num_threads),
        STABLE_RLHF_FIELD(Swav, isa),
    };
    define<Swav>(m, "swav_log_sums", fields, swav_log_sums);
    define<Swav>(m, "swav_balance", fields, swav_balance);
    define<Swav>(m, "swav_loss", fields, swav_loss);
    m.attr("SWAV_PADDING") = kSwavPadding;
    m.attr("SWAV_MOST_DIGITS") = kSwavMostDigits;
}

}  // namespace stable_rlhf
