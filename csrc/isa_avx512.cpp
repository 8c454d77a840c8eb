// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define SIMD_NAMESPACE avx512
#define SIMD_WIDTH 16
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
