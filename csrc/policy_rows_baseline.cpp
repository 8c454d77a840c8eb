// The row kernel for any processor: four lanes, which are SSE2 on x86-64 and NEON on ARM.
#define ROWS_NAMESPACE rows_baseline
#define ROWS_WIDTH 4
#include "policy_rows_kernel.h"
