// Mean, spread and scaling of masked values, in float64.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "parallel.h"
#include "whiten.h"

namespace stable_rlhf {
namespace {

constexpr int64_t kBlock = 4096;
constexpr double kValue = 1.2;  // nanoseconds of one thread for a value
constexpr int kWidth = 4;

// Four lanes on the compiler's vector types, two registers of SSE2 or NEON; passed by address, for compilers warn of
// values wider than a register.
typedef double Doubles __attribute__((vector_size(8 * kWidth)));
typedef int64_t Choices __attribute__((vector_size(8 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

// The first n of four elements.
template <typename T>
void load(const T* x, int64_t n, Doubles* out) {
    typedef T Values __attribute__((vector_size(sizeof(T) * kWidth)));
    Values values{};
    std::memcpy(&values, x, n == kWidth ? sizeof(values) : n * sizeof(T));
    *out = __builtin_convertvector(values, Doubles);
}

template <typename T>
void store(const Doubles& y, int64_t n, T* out) {
    typedef T Values __attribute__((vector_size(sizeof(T) * kWidth)));
    const Values values = __builtin_convertvector(y, Values);
    std::memcpy(out, &values, n == kWidth ? sizeof(values) : n * sizeof(T));
}

// All bits where one of the first n elements counts.
template <bool masked>
void choose(const uint8_t* mask, int64_t at, int64_t n, Choices* out) {
    Bytes bytes{};
    if (masked) {
        std::memcpy(&bytes, mask + at, n == kWidth ? sizeof(bytes) : n);
    } else if (n == kWidth) {
        bytes = bytes + 1;
    } else {
        std::memset(&bytes, 1, n);
    }
    *out = __builtin_convertvector(bytes, Choices) != 0;
}

// A choice, not a product: what lies under the mask may be NaN.
inline void keep(const Choices& choices, Doubles* x) { *x = (Doubles)((Choices)*x & choices); }

// Moments of a block, from distances to its first element: sum of squares and squared sum then cancel no more than
// log2(kBlock) bits in the worst case (the first element is the far one), and a constant gives exactly 0.
template <bool masked, typename T>
Moments block_moments(const T* x, const uint8_t* mask, int64_t n) {
    int64_t first = 0;
    if (masked) {
        while (first < n && !mask[first]) ++first;
    }
    if (first == n) return {0, 0, 0};
    const double origin = x[first];
    Doubles sum{}, square{};
    Choices count{};
    const auto add = [&](int64_t at, int64_t width) {
        Doubles d;
        Choices choices;
        load(x + at, width, &d);
        choose<masked>(mask, at, width, &choices);
        d = d - origin;
        keep(choices, &d);
        sum += d;
        square += d * d;
        count -= choices;
    };
    int64_t at = first;
    for (; at + kWidth <= n; at += kWidth) add(at, kWidth);
    if (at < n) add(at, n - at);
    const double total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const double squares = (square[0] + square[1]) + (square[2] + square[3]);
    const double number = static_cast<double>(count[0] + count[1] + count[2] + count[3]);
    const double distances = squares - total * (total / number);
    // Rounding may leave less than nothing.
    return {number, origin + total / number, distances < 0 ? 0 : distances};
}

template <bool masked, typename T>
void scale_block(const T* x, const uint8_t* mask, int64_t n, double mean, double factor, double back, T* out) {
    const auto scale = [&](int64_t at, int64_t width) {
        Doubles scaled;
        Choices choices;
        load(x + at, width, &scaled);
        choose<masked>(mask, at, width, &choices);
        scaled = (scaled - mean) * factor + back;
        keep(choices, &scaled);
        store(scaled, width, out + at);
    };
    int64_t at = 0;
    for (; at + kWidth <= n; at += kWidth) scale(at, kWidth);
    if (at < n) scale(at, n - at);
}

}  // namespace

template <typename T>
Moments masked_moments(const T* x, const uint8_t* mask, int64_t n, int num_threads) {
    std::vector<Moments> parts((n + kBlock - 1) / kBlock);
    // Blocks are cut and merged the same way for any number of threads.
    parallel_for(static_cast<int64_t>(parts.size()), 8, kValue * kBlock, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t b = from; b < to; ++b) {
            const int64_t at = b * kBlock, length = std::min(kBlock, n - at);
            parts[b] = mask ? block_moments<true>(x + at, mask + at, length)
                            : block_moments<false>(x + at, nullptr, length);
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
                  int num_threads, T* out) {
    const double factor = 1.0 / std::sqrt(variance), back = shift_mean ? 0.0 : mean;
    parallel_for(n, 8 * kBlock, kValue, num_threads, [&](int64_t from, int64_t to) {
        if (mask) {
            scale_block<true>(x + from, mask + from, to - from, mean, factor, back, out + from);
        } else {
            scale_block<false>(x + from, mask, to - from, mean, factor, back, out + from);
        }
    });
}

namespace {

template <typename T>
void bind_type(pybind11::module_& m, const std::string& suffix) {
    const auto array = [](std::uintptr_t address) { return reinterpret_cast<T*>(address); };
    const auto bytes = [](std::uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); };
    m.def(("masked_moments_" + suffix).c_str(),
          [=](std::uintptr_t x, std::uintptr_t mask, int64_t n, int num_threads) {
              Moments moments{};
              {
                  pybind11::gil_scoped_release without;
                  moments = masked_moments<T>(array(x), bytes(mask), n, num_threads);
              }
              return pybind11::make_tuple(moments.count, moments.mean, moments.square);
          });
    m.def(("masked_scale_" + suffix).c_str(),
          [=](std::uintptr_t x, std::uintptr_t mask, int64_t n, double mean, double variance, bool shift_mean,
              int num_threads, std::uintptr_t out) {
              masked_scale<T>(array(x), bytes(mask), n, mean, variance, shift_mean, num_threads, array(out));
          },
          pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace

void bind_whiten(pybind11::module_& m) {
    bind_type<float>(m, "f32");
    bind_type<double>(m, "f64");
}

}  // namespace stable_rlhf
