// Shares rows out to threads, and closes the gaps that dropped rows leave.
#include "policy.h"

#include <cstring>
#include <vector>

#include "fields.h"
#include "isa.h"
#include "parallel.h"
#include "room.h"

namespace stable_rlhf {
namespace {

constexpr double kLogit = 1.0;  // nanoseconds of one thread for a logit
// A loss on few rows has just used torch's workers, and will again: 64 rows of 1,000 words between their products took 20
// to 30 of 60 microseconds less.
constexpr double kWorthThreadsOfFewRows = 2e4;

// One row's exponentials, 4 bytes a word of the vocabulary.
float* kept_by_this_thread(const Rows& call) {
    thread_local std::vector<float> kept;
    return call.mode == RowsMode::policy ? room(kept, kept_floats(call.vocabulary)) : nullptr;
}

}  // namespace

int64_t rows(const Rows& call) {
    const Kernels& chosen = kernels(call.isa);
    const double width = static_cast<double>(call.vocabulary);
    parallel_for(call.count, 4, kLogit * width, call.num_threads,
                 [&](int64_t begin, int64_t end) { chosen.rows(call, begin, end, kept_by_this_thread(call)); },
                 call.between_products ? kWorthThreadsOfFewRows : kWorthThreads);
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
    const int64_t bytes = call.gradient_type == LogitsType::f32 ? 4 : 2;
    char* gradient = static_cast<char*>(call.gradient);
    parallel_for(static_cast<int64_t>(gaps.size()), 4, 0.2 * kLogit * width, call.num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
            std::memcpy(gradient + gaps[g] * call.gradient_stride * bytes,
                        gradient + call.kept[gaps[g]] * call.gradient_stride * bytes, call.vocabulary * bytes);
        }
    });
    return kept;
}

void column_peaks(const Columns& call) {
    const Kernels& chosen = kernels(call.isa);
    const double each = 0.5 * kLogit * static_cast<double>(call.count);
    parallel_for(call.vocabulary, 1024, each, call.num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += 1024) chosen.peaks(call, at, std::min(at + 1024, end));
    });
}

void dropped_masses(const Columns& call) {
    const Kernels& chosen = kernels(call.isa);
    parallel_for(call.count, 2, kLogit * static_cast<double>(call.vocabulary), call.num_threads,
                 [&](int64_t begin, int64_t end) { chosen.masses(call, begin, end); });
}

namespace {

template <typename T>
void gather(const GatheredColumns& call) {
    const double each = kLogit * static_cast<double>(call.num_columns);
    parallel_for(call.num_rows, 2, each, call.num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const T* row = static_cast<const T*>(call.gradient) + call.rows[i] * call.stride;
            T* out = static_cast<T*>(call.out) + i * call.num_columns;
            for (int64_t j = 0; j < call.num_columns; ++j) out[j] = row[call.columns[j]];
        }
    });
}

}  // namespace

void gather_columns(const GatheredColumns& call) {
    call.bytes == 4 ? gather<uint32_t>(call) : gather<uint16_t>(call);
}

void bind_policy(pybind11::module_& m) {
    define<Rows>(m, "rows", {
        STABLE_RLHF_FIELD(Rows, mode),
        STABLE_RLHF_FIELD(Rows, type),
        STABLE_RLHF_FIELD(Rows, gradient_type),
        STABLE_RLHF_FIELD(Rows, logits),
        STABLE_RLHF_FIELD(Rows, gradient),
        STABLE_RLHF_FIELD(Rows, logits_stride),
        STABLE_RLHF_FIELD(Rows, gradient_stride),
        STABLE_RLHF_FIELD(Rows, row),
        STABLE_RLHF_FIELD(Rows, count),
        STABLE_RLHF_FIELD(Rows, vocabulary),
        STABLE_RLHF_FIELD(Rows, target),
        STABLE_RLHF_FIELD(Rows, inverse_temperature),
        STABLE_RLHF_FIELD(Rows, inverse_temperature_of_all),
        STABLE_RLHF_FIELD(Rows, softcap),
        STABLE_RLHF_FIELD(Rows, kind),
        STABLE_RLHF_FIELD(Rows, old_logprob),
        STABLE_RLHF_FIELD(Rows, advantage),
        STABLE_RLHF_FIELD(Rows, ref_logprob),
        STABLE_RLHF_FIELD(Rows, row_weight),
        STABLE_RLHF_FIELD(Rows, clip_low),
        STABLE_RLHF_FIELD(Rows, clip_high),
        STABLE_RLHF_FIELD(Rows, dual_clip),
        STABLE_RLHF_FIELD(Rows, kl_coef),
        STABLE_RLHF_FIELD(Rows, kl_clamp),
        STABLE_RLHF_FIELD(Rows, kl_ratio_max),
        STABLE_RLHF_FIELD(Rows, kl_estimator),
        STABLE_RLHF_FIELD(Rows, kl_apart),
        STABLE_RLHF_FIELD(Rows, kl_unbiased),
        STABLE_RLHF_FIELD(Rows, objective),
        STABLE_RLHF_FIELD(Rows, entropy_coef),
        STABLE_RLHF_FIELD(Rows, entropy_scale),
        STABLE_RLHF_FIELD(Rows, log_ratio_clamp),
        STABLE_RLHF_FIELD(Rows, policy_scale),
        STABLE_RLHF_FIELD(Rows, rehearsal_scale),
        STABLE_RLHF_FIELD(Rows, coefficient),
        STABLE_RLHF_FIELD(Rows, entropy_coefficient),
        STABLE_RLHF_FIELD(Rows, logprob),
        STABLE_RLHF_FIELD(Rows, entropy),
        STABLE_RLHF_FIELD(Rows, max),
        STABLE_RLHF_FIELD(Rows, log_sum),
        STABLE_RLHF_FIELD(Rows, weighted),
        STABLE_RLHF_FIELD(Rows, target_logit),
        STABLE_RLHF_FIELD(Rows, kept),
        STABLE_RLHF_FIELD(Rows, num_threads),
        STABLE_RLHF_FIELD(Rows, between_products),
        STABLE_RLHF_FIELD(Rows, isa),
    }, rows);
    const std::initializer_list<Field<Columns>> columns = {
        STABLE_RLHF_FIELD(Columns, type),
        STABLE_RLHF_FIELD(Columns, gradient),
        STABLE_RLHF_FIELD(Columns, rows),
        STABLE_RLHF_FIELD(Columns, stride),
        STABLE_RLHF_FIELD(Columns, count),
        STABLE_RLHF_FIELD(Columns, vocabulary),
        STABLE_RLHF_FIELD(Columns, inverse_scale),
        STABLE_RLHF_FIELD(Columns, thresholds),
        STABLE_RLHF_FIELD(Columns, num_thresholds),
        STABLE_RLHF_FIELD(Columns, peaks),
        STABLE_RLHF_FIELD(Columns, masses),
        STABLE_RLHF_FIELD(Columns, num_threads),
        STABLE_RLHF_FIELD(Columns, isa),
    };
    define<Columns>(m, "column_peaks", columns, column_peaks);
    define<Columns>(m, "dropped_masses", columns, dropped_masses);
    define<GatheredColumns>(m, "gather_columns", {
        STABLE_RLHF_FIELD(GatheredColumns, gradient),
        STABLE_RLHF_FIELD(GatheredColumns, stride),
        STABLE_RLHF_FIELD(GatheredColumns, bytes),
        STABLE_RLHF_FIELD(GatheredColumns, rows),
        STABLE_RLHF_FIELD(GatheredColumns, num_rows),
        STABLE_RLHF_FIELD(GatheredColumns, columns),
        STABLE_RLHF_FIELD(GatheredColumns, num_columns),
        STABLE_RLHF_FIELD(GatheredColumns, out),
        STABLE_RLHF_FIELD(GatheredColumns, num_threads),
    }, gather_columns);
}

}  // namespace stable_rlhf
