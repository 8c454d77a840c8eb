// Moments of masked values and their scaling, for whitening.
#pragma once

#include <cstdint>

namespace stable_rlhf {

// Number, mean and sum of squared distances from the mean of the elements where mask is not 0 (null: of all), in
// float64, the same for any number of threads by the kernels of one instruction set (isa.h). The mean is not finite
// where an element is not.
struct Moments {
    double count;
    double mean;
    double square;
};

template <typename T>
Moments masked_moments(const T* x, const uint8_t* mask, int64_t n, int num_threads, const char* isa);

// (x - mean) / sqrt(variance) in float64, plus the mean unless shift_mean; 0 under the mask.
template <typename T>
void masked_scale(const T* x, const uint8_t* mask, int64_t n, double mean, double variance, bool shift_mean,
                  int num_threads, const char* isa, T* out);

}  // namespace stable_rlhf
