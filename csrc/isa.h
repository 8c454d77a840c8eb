// The kernels that are compiled once for each instruction set, and the choice among them at run time.
#pragma once

#include "advantage.h"
#include "policy.h"
#include "swav.h"
#include "unit_rows.h"

namespace stable_rlhf {

struct Kernels {
    const char* name;
    void (*rows)(const Rows&, int64_t begin, int64_t end, float* scratch);  // scratch: kept_floats(vocabulary)
    void (*peaks)(const Columns&, int64_t begin, int64_t end);
    void (*masses)(const Columns&, int64_t begin, int64_t end);
    double (*sum)(const float* x, int64_t n);
    void (*exponentials)(const double* x, int64_t n, double* out);
    void (*pair_terms)(const PairBlock<float>&);
    void (*k3)(const float* d, int64_t n, float* kl);
    void (*swav_columns)(const Swav&, int64_t view, int64_t begin, int64_t end, float* largest, float* sum,
                         float* scratch);
    void (*swav_masses)(const Swav&, int64_t view, int64_t begin, int64_t end, float* sum);
    void (*swav_codes)(const Swav&, int64_t view, int64_t begin, int64_t end, float* sum);
    double (*swav_rows)(const Swav&, int64_t begin, int64_t end, float* scratch);
    // Of a block: number, mean and sum of squared distances from it; scaled values (whiten_kernel.h).
    void (*moments_f32)(const float* x, const uint8_t* mask, int64_t n, double* count, double* mean, double* square);
    void (*moments_f64)(const double* x, const uint8_t* mask, int64_t n, double* count, double* mean, double* square);
    void (*scale_f32)(const float* x, const uint8_t* mask, int64_t n, double mean, double factor, double back,
                      float* out);
    void (*scale_f64)(const double* x, const uint8_t* mask, int64_t n, double mean, double factor, double back,
                      double* out);
    // Of k-means (kmeans_kernel.h): the place of the largest score less half, sum += weight x, and squared distances.
    void (*nearest)(const float* scores, const float* half, int64_t n, int64_t c, int32_t* labels);
    void (*add_row)(const float* x, double weight, int64_t d, double* sum);
    void (*distances)(const float* rows, const float* scale, const float* centroids, const int32_t* labels, int64_t n,
                      int64_t d, float* out);
    bool (*unit_rows)(const UnitRows&, int64_t begin, int64_t end);
    void (*unit_rows_back)(const UnitRows&, int64_t begin, int64_t end);
};

// The kernels for an instruction set, the best this processor has for "" or null; an error when it lacks that one.
const Kernels& kernels(const char* isa);

// Names of the instruction sets this processor can run, the best first; null-terminated.
const char* const* isa_names();

}  // namespace stable_rlhf
