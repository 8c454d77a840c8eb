// total [m, n] in float32 from matrices of bfloat16: total = a b, or total += a b.
#pragma once

#include <cstdint>

namespace stable_rlhf {

struct WideProduct {
    const uint16_t* a;        // [m, k]
    const uint16_t* b;        // [k, n]
    float* total;             // [m, n], rows of n numbers one behind the other
    const int64_t* b_places;  // [k] the rows of b, which has more, or null: 0 to k - 1; null where b_row is 1
    const int64_t* total_places;  // [m] the rows of total, which has more, or null; no two are the same
    int64_t m, n, k;
    int64_t a_row, a_column;  // elements between rows, and between columns; one of the two is 1
    int64_t b_row, b_column;
    bool fresh;               // total = a b: what it holds does not count
    int num_threads;
};

// out [rows, n] in bfloat16: the sum over parts of a^T b, made in float32, a stretch of rows at a time that stays in a
// thread's cache: the sum in float32 never exists whole, and nothing of its size crosses memory.
struct WideSum {
    struct Part {
        int64_t a, a_row;  // address of [k, m], each row's numbers side by side, and the elements between its rows
        int64_t m, k;
        int64_t b, b_row;  // of [k, n]
        int64_t places;    // of [m], ascending: the rows of out; 0: 0 to m - 1
    };
    const int64_t* parts;  // [num_parts] of Part
    uint16_t* out;         // rows of n numbers one behind the other
    int64_t num_parts, rows, n;
    int num_threads;
};

// The rows of a, or the columns of b: `lanes` of them, each `depth` numbers apart from the next one of its own.
struct Lanes {
    const uint16_t* at;
    int64_t lane, depth;  // elements between lanes, and between the numbers of one; one of the two is 1
    int64_t lanes;
    const int64_t* places;  // of the numbers in depth, or null: 0, 1, ...
};

constexpr int64_t kLanes = 16;  // side by side in a panel: [pairs][kLanes] pairs of neighbours in depth, 32 bits each

// Instructions of AVX-512 BF16; on a processor or of a compiler without, nothing here may be called.
namespace avx512bf16 {

extern const bool compiled;

// A panel from lane `first` on, of depth [begin, end); what is not there is 0. `panel` is aligned to 64 bytes.
void pack(const Lanes& from, int64_t first, int64_t begin, int64_t end, uint32_t* panel);

// The product over `pairs` of panels of m rows and of n columns, each `panel` numbers apart.
struct Block {
    const uint32_t *a, *b;
    int64_t panel, m, n, pairs;
    bool by_rows;  // the rows' panels are in the cache of the nearest level, else the columns'
    bool add;      // to what total holds
    float* total;  // its first column of these
    int64_t stride;
    const int64_t* places;  // [m] rows of total, or null: 0 to m - 1
};

void block(const Block&);

// The nearest bfloat16 to each number, of two as near the even one.
void narrow(const float* from, int64_t count, uint16_t* to);

}  // namespace avx512bf16
}  // namespace stable_rlhf
