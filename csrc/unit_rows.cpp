// Shares rows out to threads.
#include "unit_rows.h"

#include <atomic>

#include "fields.h"
#include "isa.h"
#include "parallel.h"

namespace stable_rlhf {
namespace {

constexpr double kValue = 1.0;  // nanoseconds of one thread for a value, which another core has just written

template <typename Body>
void over_rows(const UnitRows& call, const Body& body) {
    const int64_t block = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, call.width));
    const double each = kValue * static_cast<double>(call.width);
    parallel_for(call.rows, block, each, call.num_threads, body, kWorthThreadsBetweenProducts);
}

}  // namespace

bool unit_rows(const UnitRows& call) {
    const Kernels& chosen = kernels(call.isa);
    std::atomic<bool> finite{true};
    over_rows(call, [&](int64_t begin, int64_t end) {
        if (!chosen.unit_rows(call, begin, end)) finite = false;
    });
    return finite;
}

void unit_rows_back(const UnitRows& call) {
    const Kernels& chosen = kernels(call.isa);
    over_rows(call, [&](int64_t begin, int64_t end) { chosen.unit_rows_back(call, begin, end); });
}

void bind_unit_rows(pybind11::module_& m) {
    const std::initializer_list<Field<UnitRows>> fields = {
        STABLE_RLHF_FIELD(UnitRows, x),           STABLE_RLHF_FIELD(UnitRows, type),
        STABLE_RLHF_FIELD(UnitRows, rows),        STABLE_RLHF_FIELD(UnitRows, width),
        STABLE_RLHF_FIELD(UnitRows, unit),        STABLE_RLHF_FIELD(UnitRows, inverse),
        STABLE_RLHF_FIELD(UnitRows, upstream),    STABLE_RLHF_FIELD(UnitRows, gradient),
        STABLE_RLHF_FIELD(UnitRows, num_threads), STABLE_RLHF_FIELD(UnitRows, isa),
    };
    define<UnitRows>(m, "unit_rows", fields, unit_rows);
    define<UnitRows>(m, "unit_rows_back", fields, unit_rows_back);
}

}  // namespace stable_rlhf
