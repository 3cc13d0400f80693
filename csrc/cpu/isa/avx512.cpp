// The CPU kernels for AVX-512 (Skylake-X, Ice Lake, Zen 4 and newer).
#include "cpu/standard_headers.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#define ADASPLASH2_ISA avx512
#define ADASPLASH2_AVX2
#define ADASPLASH2_AVX512
#include "cpu/kernels.h"
