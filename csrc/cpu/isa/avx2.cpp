// The CPU kernels for AVX2 + FMA (Haswell, Zen and newer).
#include "cpu/standard_headers.h"

#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#define ADASPLASH2_ISA avx2
#define ADASPLASH2_AVX2
#include "cpu/kernels.h"
