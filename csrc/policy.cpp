// Shares rows out to threads, and closes the gaps that dropped rows leave.
#include "policy.h"

#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace stable_rlhf {
namespace {

constexpr double kLogit = 1.0;  // nanoseconds of one thread for a logit

}  // namespace

int64_t rows(const Rows& call, const char* isa) {
    const Kernels* const found = kernels(isa);
    if (found == nullptr) return -1;
    const double width = static_cast<double>(call.vocabulary);
    parallel_for(call.count, 4, kLogit * width, call.num_threads,
                 [&](int64_t begin, int64_t end) { found->rows(call, begin, end); });
    if (call.mode == RowsMode::statistics) return 0;
    if (call.mode == RowsMode::given || call.kept == nullptr) return call.count;

    const auto dropped = [&](int64_t i) { return call.coefficient[i] == 0.0f && call.entropy_coefficient[i] == 0.0f; };
    int64_t kept = 0;
    for (int64_t i = 0; i < call.count; ++i) kept += !dropped(i);
    // The gradient rows of the first `kept` places stay where they are; later ones move into the gaps.
    std::vector<int64_t> gaps;
    int64_t next = kept;
    for (int64_t place = 0; place < kept; ++place) {
        call.kept[place] = place;
        if (!dropped(place)) continue;
        while (dropped(next)) ++next;
        call.kept[place] = next++;
        gaps.push_back(place);
    }
    const int64_t bytes = call.type == LogitsType::f32 ? 4 : 2;
    char* gradient = static_cast<char*>(call.gradient);
    parallel_for(static_cast<int64_t>(gaps.size()), 4, 0.2 * kLogit * width, call.num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
            std::memcpy(gradient + gaps[g] * call.gradient_stride * bytes,
                        gradient + call.kept[gaps[g]] * call.gradient_stride * bytes, call.vocabulary * bytes);
        }
    });
    return kept;
}

bool column_peaks(const Columns& call, const char* isa) {
    const Kernels* const found = kernels(isa);
    if (found == nullptr) return false;
    const double each = 0.5 * kLogit * static_cast<double>(call.count);
    parallel_for(call.vocabulary, 1024, each, call.num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += 1024) found->peaks(call, at, std::min(at + 1024, end));
    });
    return true;
}

bool dropped_masses(const Columns& call, const char* isa) {
    const Kernels* const found = kernels(isa);
    if (found == nullptr) return false;
    parallel_for(call.count, 2, kLogit * static_cast<double>(call.vocabulary), call.num_threads,
                 [&](int64_t begin, int64_t end) { found->masses(call, begin, end); });
    return true;
}

namespace {

template <typename T>
void gather(const T* gradient, int64_t stride, const int64_t* rows, int64_t num_rows, const int64_t* columns,
            int64_t num_columns, T* out, int num_threads) {
    parallel_for(num_rows, 2, kLogit * static_cast<double>(num_columns), num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const T* row = gradient + rows[i] * stride;
            for (int64_t j = 0; j < num_columns; ++j) out[i * num_columns + j] = row[columns[j]];
        }
    });
}

}  // namespace

void gather_columns(const void* gradient, int64_t stride, int bytes, const int64_t* rows, int64_t num_rows,
                    const int64_t* columns, int64_t num_columns, void* out, int num_threads) {
    if (bytes == 4) {
        gather(static_cast<const uint32_t*>(gradient), stride, rows, num_rows, columns, num_columns,
               static_cast<uint32_t*>(out), num_threads);
    } else {
        gather(static_cast<const uint16_t*>(gradient), stride, rows, num_rows, columns, num_columns,
               static_cast<uint16_t*>(out), num_threads);
    }
}

}  // namespace stable_rlhf
