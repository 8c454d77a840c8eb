// Picks the instruction set at run time, shares rows out to threads, and closes the gaps that dropped rows leave.
#include "policy_rows.h"

#include <cstring>

#include "parallel.h"

namespace stable_rlhf {

namespace rows_baseline { void run_rows(const Rows& call, int64_t begin, int64_t end); }
#if defined(__x86_64__)
namespace rows_avx2 { void run_rows(const Rows& call, int64_t begin, int64_t end); }
namespace rows_avx512 { void run_rows(const Rows& call, int64_t begin, int64_t end); }
#endif

namespace {

using RunRows = void (*)(const Rows&, int64_t, int64_t);

struct Choice {
    const char* names[4];
    RunRows functions[4];
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
            c.functions[c.count++] = rows_avx512::run_rows;
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            c.names[c.count] = "avx2";
            c.functions[c.count++] = rows_avx2::run_rows;
        }
#endif
        c.names[c.count] = "baseline";
        c.functions[c.count++] = rows_baseline::run_rows;
        return c;
    }();
    return found;
}

}  // namespace

const char* const* rows_isas() { return choices().names; }

int64_t rows(const Rows& call, const char* isa) {
    const Choice& choice = choices();
    RunRows run = isa[0] == '\0' ? choice.functions[0] : nullptr;
    for (int i = 0; i < choice.count; ++i) {
        if (std::strcmp(isa, choice.names[i]) == 0) run = choice.functions[i];
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

}  // namespace stable_rlhf
