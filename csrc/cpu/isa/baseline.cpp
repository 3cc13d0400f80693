// The CPU kernels for every x86-64 machine (SSE2).
#include "cpu/standard_headers.h"

#define ADASPLASH2_ISA baseline
#include "cpu/kernels.h"
