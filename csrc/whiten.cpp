// Mean, spread and scaling of masked values, in float64.
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "whiten.h"

namespace stable_rlhf {
namespace {

constexpr int64_t kBlock = 4096;
constexpr double kValue = 1.2;  // nanoseconds of one thread for a value

void moments(const Kernels& k, const float* x, const uint8_t* mask, int64_t n, Moments* out) {
    k.moments_f32(x, mask, n, &out->count, &out->mean, &out->square);
}
void moments(const Kernels& k, const double* x, const uint8_t* mask, int64_t n, Moments* out) {
    k.moments_f64(x, mask, n, &out->count, &out->mean, &out->square);
}
void scale(const Kernels& k, const float* x, const uint8_t* mask, int64_t n, double mean, double factor, double back,
           float* out) {
    k.scale_f32(x, mask, n, mean, factor, back, out);
}
void scale(const Kernels& k, const double* x, const uint8_t* mask, int64_t n, double mean, double factor, double back,
           double* out) {
    k.scale_f64(x, mask, n, mean, factor, back, out);
}

}  // namespace

template <typename T>
Moments masked_moments(const T* x, const uint8_t* mask, int64_t n, int num_threads, const char* isa) {
    const Kernels& chosen = kernels(isa);
    std::vector<Moments> parts((n + kBlock - 1) / kBlock);
    // Blocks are cut and merged the same way for any number of threads.
    parallel_for(static_cast<int64_t>(parts.size()), 8, kValue * kBlock, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t b = from; b < to; ++b) {
            const int64_t at = b * kBlock, length = std::min(kBlock, n - at);
            moments(chosen, x + at, mask ? mask + at : nullptr, length, &parts[b]);
        }
    });
    Moments all{0, 0, 0};
    for (const Moments& part : parts) {  // Chan, Golub and LeVeque 1979
        if (part.count == 0) continue;
        const double count = all.count + part.count, distance = part.mean - all.mean;
        if (all.count == 0) {
            all = part;
            continue;
        }
        all.mean += distance * (part.count / count);
        all.square += part.square + distance * distance * (all.count * part.count / count);
        all.count = count;
    }
    return all;
}

template <typename T>
void masked_scale(const T* x, const uint8_t* mask, int64_t n, double mean, double variance, bool shift_mean,
                  int num_threads, const char* isa, T* out) {
    const Kernels& chosen = kernels(isa);
    const double factor = 1.0 / std::sqrt(variance), back = shift_mean ? 0.0 : mean;
    parallel_for(n, 8 * kBlock, kValue, num_threads, [&](int64_t from, int64_t to) {
        scale(chosen, x + from, mask ? mask + from : nullptr, to - from, mean, factor, back, out + from);
    });
}

namespace {

template <typename T>
void bind_type(pybind11::module_& m, const std::string& suffix) {
    const auto array = [](std::uintptr_t address) { return reinterpret_cast<T*>(address); };
    const auto bytes = [](std::uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); };
    m.def(("masked_moments_" + suffix).c_str(),
          [=](std::uintptr_t x, std::uintptr_t mask, int64_t n, int num_threads, const std::string& isa) {
              Moments all{};
              {
                  pybind11::gil_scoped_release without;
                  all = masked_moments<T>(array(x), bytes(mask), n, num_threads, isa.c_str());
              }
              return pybind11::make_tuple(all.count, all.mean, all.square);
          });
    m.def(("masked_scale_" + suffix).c_str(),
          [=](std::uintptr_t x, std::uintptr_t mask, int64_t n, double mean, double variance, bool shift_mean,
              int num_threads, const std::string& isa, std::uintptr_t out) {
              masked_scale<T>(array(x), bytes(mask), n, mean, variance, shift_mean, num_threads, isa.c_str(),
                              array(out));
          },
          pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace

void bind_whiten(pybind11::module_& m) {
    bind_type<float>(m, "f32");
    bind_type<double>(m, "f64");
}

}  // namespace stable_rlhf
