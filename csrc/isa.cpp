#include "isa.h"

#include <cstring>
#include <stdexcept>
#include <string>

#define DECLARE_KERNELS(name)                                                                                      \
    namespace name {                                                                                               \
    void run_rows(const Rows& call, int64_t begin, int64_t end, float* scratch);                                   \
    void run_peaks(const Columns& call, int64_t begin, int64_t end);                                               \
    void run_masses(const Columns& call, int64_t begin, int64_t end);                                              \
    double sum(const float* x, int64_t n);                                                                         \
    void exponentials(const double* x, int64_t n, double* out);                                                    \
    void pair_terms(const PairBlock<float>& block);                                                                \
    void k3(const float* d, int64_t n, float* kl);                                                                 \
    void swav_columns(const Swav& call, int64_t view, int64_t begin, int64_t end, float* largest, float* sum,      \
                      float* scratch);                                                                             \
    void swav_masses(const Swav& call, int64_t view, int64_t begin, int64_t end, float* sum);                      \
    void swav_codes(const Swav& call, int64_t view, int64_t begin, int64_t end, float* sum);                       \
    double swav_rows(const Swav& call, int64_t begin, int64_t end, float* scratch);                                \
    void moments_f32(const float* x, const uint8_t* mask, int64_t n, double* count, double* mean, double* square); \
    void moments_f64(const double* x, const uint8_t* mask, int64_t n, double* count, double* mean, double* square); \
    void scale_f32(const float* x, const uint8_t* mask, int64_t n, double mean, double factor, double back,        \
                   float* out);                                                                                    \
    void scale_f64(const double* x, const uint8_t* mask, int64_t n, double mean, double factor, double back,       \
                   double* out);                                                                                   \
    void nearest(const float* scores, const float* half, int64_t n, int64_t c, int32_t* labels);                   \
    void add_row(const float* x, double weight, int64_t d, double* sum);                                           \
    void distances(const float* rows, const float* scale, const float* centroids, const int32_t* labels,           \
                   int64_t n, int64_t d, float* out);                                                              \
    bool unit_rows(const UnitRows& call, int64_t begin, int64_t end);                                              \
    void unit_rows_back(const UnitRows& call, int64_t begin, int64_t end);                                         \
    }
#define KERNELS_OF(name)                                                                                   \
    Kernels {                                                                                              \
        #name, name::run_rows, name::run_peaks, name::run_masses, name::sum, name::exponentials,           \
            name::pair_terms, name::k3, name::swav_columns, name::swav_masses, name::swav_codes,           \
            name::swav_rows, name::moments_f32,                                                            \
            name::moments_f64, name::scale_f32, name::scale_f64, name::nearest, name::add_row,             \
            name::distances, name::unit_rows, name::unit_rows_back                                         \
    }

namespace stable_rlhf {

DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(avx512)
#endif

namespace {

struct Choice {
    const char* names[4];  // null-terminated
    Kernels kernels[3];
    int count;
};

const Choice& choices() {
    static const Choice of_this_processor = [] {
        Choice c{};
        const auto add = [&c](const Kernels& kernels) {
            c.names[c.count] = kernels.name;
            c.kernels[c.count++] = kernels;
        };
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            add(KERNELS_OF(avx512));
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add(KERNELS_OF(avx2));
#endif
        add(KERNELS_OF(baseline));
        return c;
    }();
    return of_this_processor;
}

}  // namespace

const char* const* isa_names() { return choices().names; }

const Kernels& kernels(const char* isa) {
    const Choice& choice = choices();
    if (isa == nullptr || isa[0] == '\0') return choice.kernels[0];
    for (int i = 0; i < choice.count; ++i) {
        if (std::strcmp(isa, choice.names[i]) == 0) return choice.kernels[i];
    }
    throw std::runtime_error("this processor cannot run the kernels for '" + std::string(isa) + "'");
}

}  // namespace stable_rlhf
