// Picks the instruction set at run time, shares rows out to threads, and closes the gaps that dropped rows leave.
#include "policy_rows.h"

#include <cstring>

#include "parallel.h"

namespace stable_rlhf {

namespace rows_baseline {
void run_rows(const Rows& call, int64_t begin, int64_t end);
void run_peaks(const Columns& call, int64_t begin, int64_t end);
void run_masses(const Columns& call, int64_t begin, int64_t end);
}
#if defined(__x86_64__)
namespace rows_avx2 {
void run_rows(const Rows& call, int64_t begin, int64_t end);
void run_peaks(const Columns& call, int64_t begin, int64_t end);
void run_masses(const Columns& call, int64_t begin, int64_t end);
}
namespace rows_avx512 {
void run_rows(const Rows& call, int64_t begin, int64_t end);
void run_peaks(const Columns& call, int64_t begin, int64_t end);
void run_masses(const Columns& call, int64_t begin, int64_t end);
}
#endif

namespace {

struct Functions {
    void (*rows)(const Rows&, int64_t, int64_t);
    void (*peaks)(const Columns&, int64_t, int64_t);
    void (*masses)(const Columns&, int64_t, int64_t);
};

struct Choice {
    const char* names[4];
    Functions functions[4];
    int count;
};

const Choice& choices() {
    static const Choice found = [] {
        Choice c{};
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            c.names[c.count] = "avx512";
            c.functions[c.count++] = {rows_avx512::run_rows, rows_avx512::run_peaks, rows_avx512::run_masses};
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            c.names[c.count] = "avx2";
            c.functions[c.count++] = {rows_avx2::run_rows, rows_avx2::run_peaks, rows_avx2::run_masses};
        }
#endif
        c.names[c.count] = "baseline";
        c.functions[c.count++] = {rows_baseline::run_rows, rows_baseline::run_peaks, rows_baseline::run_masses};
        return c;
    }();
    return found;
}

}  // namespace

const char* const* rows_isas() { return choices().names; }

int64_t rows(const Rows& call, const char* isa) {
    const Choice& choice = choices();
    auto run = isa[0] == '\0' ? choice.functions[0].rows : nullptr;
    for (int i = 0; i < choice.count; ++i) {
        if (std::strcmp(isa, choice.names[i]) == 0) run = choice.functions[i].rows;
    }
    if (run == nullptr) return -1;
    parallel_for(call.count, 4, call.num_threads, [&](int64_t begin, int64_t end) { run(call, begin, end); });
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
    parallel_for(static_cast<int64_t>(gaps.size()), 4, call.num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
            std::memcpy(gradient + gaps[g] * call.gradient_stride * bytes,
                        gradient + call.kept[gaps[g]] * call.gradient_stride * bytes, call.vocabulary * bytes);
        }
    });
    return kept;
}

void column_peaks(const Columns& call) {
    const auto run = choices().functions[0].peaks;
    parallel_for(call.vocabulary, 1024, call.num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += 1024) run(call, at, std::min(at + 1024, end));
    });
}

void dropped_masses(const Columns& call) {
    const auto run = choices().functions[0].masses;
    parallel_for(call.count, 2, call.num_threads, [&](int64_t begin, int64_t end) { run(call, begin, end); });
}

namespace {

template <typename T>
void gather(const T* gradient, int64_t stride, const int64_t* rows, int64_t num_rows, const int64_t* columns,
            int64_t num_columns, T* out, int num_threads) {
    parallel_for(num_rows, 2, num_threads, [&](int64_t begin, int64_t end) {
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
