// The kernels for AVX2 with FMA and F16C (x86-64 from 2013 on).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define SIMD_NAMESPACE avx2
#define SIMD_WIDTH 8
#define SIMD_F16C
#include "advantage_kernel.h"
#include "kmeans_kernel.h"
#include "policy_kernel.h"
#include "sequence_kernel.h"
#include "swav_kernel.h"
#include "unit_rows_kernel.h"
#include "whiten_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
