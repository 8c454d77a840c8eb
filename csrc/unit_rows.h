// Rows over their lengths, and the gradient through it. Plain pointers only.
#pragma once

#include <cstdint>

namespace stable_rlhf {

struct UnitRows {
    const void* x;          // [rows, width]; forward only
    int64_t type;           // of x and gradient: 0 float32, 1 bfloat16, 2 float16
    int64_t rows, width;
    float* unit;            // [rows, width] x / |x|, or zeros where no entry of x is a normal number
    float* inverse;         // [rows] 1 / |x|, or 0
    const float* upstream;  // [rows, width] gradient by unit; backward only, like the next
    void* gradient;         // [rows, width]
    int num_threads;
    const char* isa;
};

// Results do not depend on num_threads. Returns whether all of x is finite; where it is not, results mean nothing.
bool unit_rows(const UnitRows& call);
void unit_rows_back(const UnitRows& call);

}  // namespace stable_rlhf
