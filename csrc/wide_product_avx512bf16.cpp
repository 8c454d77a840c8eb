// What a thread does of a product, in AVX-512 BF16: vdpbf16ps multiplies pairs of bfloat16 numbers and adds both products
// to a float32. No templates of the standard library here: the linker might take their code for other processors too.
#include "wide_product.h"

#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#endif

namespace stable_rlhf {
namespace avx512bf16 {

extern const bool compiled = true;

namespace {

constexpr int kRows = 8;    // of a tile: 24 sums, three vectors of columns and one of a row fill the registers
constexpr int kPanels = 3;

int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// Sixteen vectors of sixteen 32-bit numbers, lines for columns.
void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// One of each lane from `first` on, widened; depth is as `from` places it.
__m512i numbers(const Lanes& from, int64_t first, int64_t depth, __mmask16 there) {
    const uint16_t* at = from.at + first * from.lane + (from.places ? from.places[depth] : depth) * from.depth;
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at));
}

// The products of kRows rows with `columns` of kVectors panels, to the rows `out` of which there are `rows`.
template <int kVectors>
void tile(const uint32_t* a, const uint32_t* b, int64_t b_panel, int64_t pairs, float* const* out, int64_t rows,
          int64_t columns, bool add) {
    __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < pairs; ++k) {
        __m512bh y[kVectors];
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) y[j] = (__m512bh)_mm512_load_si512(b + j * b_panel + k * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[k * kLanes + i]));
#pragma GCC unroll 3
            for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], x, y[j]);
        }
    }
    const __mmask16 last = static_cast<__mmask16>((1u << (columns - (kVectors - 1) * kLanes)) - 1);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        if (i >= rows) break;
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) {
            float* to = out[i] + j * kLanes;
            const __mmask16 there = j == kVectors - 1 ? last : 0xffff;
            const __m512 sum = add ? _mm512_add_ps(sums[i][j], _mm512_maskz_loadu_ps(there, to)) : sums[i][j];
            _mm512_mask_storeu_ps(to, there, sum);
        }
    }
}

void tiles(const Block& call, int64_t i, int64_t j) {
    float* out[kRows];
    const int64_t rows = least(call.m - i, kRows), columns = least(call.n - j, kPanels * kLanes);
    for (int64_t r = 0; r < rows; ++r) out[r] = call.total + (call.places ? call.places[i + r] : i + r) * call.stride + j;
    const auto product = columns > 2 * kLanes ? tile<3> : columns > kLanes ? tile<2> : tile<1>;
    product(call.a + i / kLanes * call.panel + i % kLanes, call.b + j / kLanes * call.panel, call.panel, call.pairs, out,
            rows, columns, call.add);
}

}  // namespace

void pack(const Lanes& from, int64_t first, int64_t begin, int64_t end, uint32_t* panel) {
    const int64_t lanes = least(kLanes, from.lanes - first);
    const uint16_t* const at = from.at + first * from.lane;
    const int64_t depth = end - begin;
    if (from.depth == 1) {  // pairs lie side by side already
        for (int64_t k = 0; k < depth; k += 2 * kLanes) {
            const int64_t some = least(2 * kLanes, depth - k);
            const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << some) - 1);
            __m512i lines[16];
            for (int64_t i = 0; i < kLanes; ++i) {
                lines[i] = i < lanes ? _mm512_maskz_loadu_epi16(there, at + i * from.lane + begin + k) : _mm512_setzero_si512();
            }
            transpose(lines);
            for (int64_t pair = 0; 2 * pair < some; ++pair) {
                _mm512_store_si512(panel + (k / 2 + pair) * kLanes, lines[pair]);
            }
        }
        return;
    }
    const __mmask16 there = static_cast<__mmask16>((1u << lanes) - 1);
    for (int64_t k = 0; k < depth; k += 2) {
        __m512i pairs = numbers(from, first, begin + k, there);
        if (k + 1 < depth) {
            pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(numbers(from, first, begin + k + 1, there), 16));
        }
        _mm512_store_si512(panel + k / 2 * kLanes, pairs);
    }
}

// What is farther away is read once: the columns' panels where the rows' are near, the rows' where the columns' are.
void block(const Block& call) {
    const int64_t width = kPanels * kLanes;
    if (call.by_rows) {
        for (int64_t j = 0; j < call.n; j += width) {
            for (int64_t i = 0; i < call.m; i += kRows) tiles(call, i, j);
        }
    } else {
        for (int64_t i = 0; i < call.m; i += kRows) {
            for (int64_t j = 0; j < call.n; j += width) tiles(call, i, j);
        }
    }
}

void narrow(const float* from, int64_t count, uint16_t* to) {
    // In whole numbers: the instruction for it takes the smallest numbers for 0.
    const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff), nan = _mm512_set1_epi32(0x7fc0);
    for (int64_t i = 0; i < count; i += kLanes) {
        const __mmask16 there = static_cast<__mmask16>((1u << least(count - i, kLanes)) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(there, from + i);
        const __m512i bits = _mm512_castps_si512(x), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(half, even)), 16);
        const __m512i y = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
        _mm256_mask_storeu_epi16(to + i, there, _mm512_cvtepi32_epi16(y));
    }
}

}  // namespace avx512bf16
}  // namespace stable_rlhf

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace stable_rlhf {
namespace avx512bf16 {

extern const bool compiled = false;

void pack(const Lanes&, int64_t, int64_t, int64_t, uint32_t*) {}
void block(const Block&) {}
void narrow(const float*, int64_t, uint16_t*) {}

}  // namespace avx512bf16
}  // namespace stable_rlhf
#endif
