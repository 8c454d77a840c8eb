// The kernels for any processor: four lanes, which are SSE2 on x86-64 and NEON on ARM.
#define SIMD_NAMESPACE baseline
#define SIMD_WIDTH 4
#include "advantage_kernel.h"
#include "kmeans_kernel.h"
#include "policy_kernel.h"
#include "sequence_kernel.h"
#include "swav_kernel.h"
#include "unit_rows_kernel.h"
#include "whiten_kernel.h"
