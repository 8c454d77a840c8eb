// Rows over their lengths, and the way back, written once for every instruction set (halves.h, simd.h).
#include "halves.h"
#include "unit_rows.h"

namespace stable_rlhf {
namespace SIMD_NAMESPACE {

constexpr int64_t kSummed = 1024;  // elements that are added in float32, lane by lane, before float64 takes the sum

// Calls vectors(at) for whole vectors of [0, n) and single(at) for what is left.
template <typename Vectors, typename Single>
inline void along_row(int64_t from, int64_t to, const Vectors& vectors, const Single& single) {
    for (; from + kWidth <= to; from += kWidth) vectors(from);
    for (; from < to; ++from) single(from);
}

// The sum over a row of term(vector or number at some place).
template <typename Vectors, typename Single>
inline double row_sum(int64_t n, const Vectors& vectors, const Single& single) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kSummed) {
        Floats sums{};
        float rest = 0;
        along_row(
            begin, begin + kSummed < n ? begin + kSummed : n, [&](int64_t at) { sums += vectors(at); },
            [&](int64_t at) { rest += single(at); });
        total += double(horizontal_sum(sums)) + double(rest);
    }
    return total;
}

// The largest size of a row's elements; infinite where one is not finite.
template <typename T>
inline float largest_of(const T* x, int64_t n) {
    const Floats limit = splat(3.4028234663852886e38f), beyond = splat(__builtin_huge_valf());
    Floats top{};
    float rest = 0;
    along_row(
        0, n,
        [&](int64_t at) {
            const Floats value = load(x + at), size = value < Floats{} ? -value : value;
            top = larger(size <= limit ? size : beyond, top);  // NaN is no smaller than the limit
        },
        [&](int64_t at) {
            const float value = widen(x[at]), size = value < 0 ? -value : value;
            const float known = size <= limit[0] ? size : beyond[0];
            rest = known > rest ? known : rest;
        });
    const float most = horizontal_max(top);
    return most > rest ? most : rest;
}

template <typename T>
bool unit_rows_of(const UnitRows& call, int64_t begin, int64_t end) {
    bool finite = true;
    for (int64_t i = begin; i < end; ++i) {
        const T* x = static_cast<const T*>(call.x) + i * call.width;
        float* unit = call.unit + i * call.width;
        const float largest = largest_of(x, call.width);
        finite = finite && largest <= 3.4028234663852886e38f;
        // The largest entry is taken out first: squares of what is left neither overflow nor vanish.
        const float scale = largest < 1.17549435e-38f ? 0.0f : 1.0f / largest;
        const Floats scales = splat(scale);
        const double square = row_sum(
            call.width, [&](int64_t at) { const Floats y = load(x + at) * scales; return y * y; },
            [&](int64_t at) { const float y = widen(x[at]) * scale; return y * y; });
        const float length = square == 0 ? 1.0f : float(sqrt(square));
        const float inverse = call.inverse[i] = scale / length;
        if (inverse >= 1.17549435e-38f || scale == 0) {
            const Floats factor = splat(inverse);
            along_row(
                0, call.width, [&](int64_t at) { store(unit + at, load(x + at) * factor); },
                [&](int64_t at) { unit[at] = widen(x[at]) * inverse; });
        } else {  // of a row so long that one factor would have lost digits
            const Floats lengths = splat(length);
            along_row(
                0, call.width, [&](int64_t at) { store(unit + at, load(x + at) * scales / lengths); },
                [&](int64_t at) { unit[at] = widen(x[at]) * scale / length; });
        }
    }
    return finite;
}

// Only what is at right angles to the row turns it.
template <typename T>
void unit_rows_back_of(const UnitRows& call, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float *unit = call.unit + i * call.width, *upstream = call.upstream + i * call.width;
        T* gradient = static_cast<T*>(call.gradient) + i * call.width;
        const float along = float(row_sum(
            call.width, [&](int64_t at) { return load(unit + at) * load(upstream + at); },
            [&](int64_t at) { return unit[at] * upstream[at]; }));
        const float inverse = call.inverse[i];
        along_row(
            0, call.width,
            [&](int64_t at) {
                store(gradient + at, (load(upstream + at) - load(unit + at) * splat(along)) * splat(inverse));
            },
            [&](int64_t at) { narrow((upstream[at] - unit[at] * along) * inverse, gradient + at); });
    }
}

bool unit_rows(const UnitRows& call, int64_t begin, int64_t end) {
    switch (call.type) {
        case 0: return unit_rows_of<float>(call, begin, end);
        case 1: return unit_rows_of<BFloat16>(call, begin, end);
        default: return unit_rows_of<Float16>(call, begin, end);
    }
}
void unit_rows_back(const UnitRows& call, int64_t begin, int64_t end) {
    switch (call.type) {
        case 0: unit_rows_back_of<float>(call, begin, end); break;
        case 1: unit_rows_back_of<BFloat16>(call, begin, end); break;
        default: unit_rows_back_of<Float16>(call, begin, end);
    }
}

}  // namespace SIMD_NAMESPACE
}  // namespace stable_rlhf
