// The library that the tests run: every instance, in one translation unit.
#include "api.h"
#define ADASPLASH2_CUDA_SM90
#include "cuda/launch.cpp"
#include "cuda/sm80/instances/bfloat16_128.cu"
#include "cuda/sm80/instances/bfloat16_256.cu"
#include "cuda/sm80/instances/bfloat16_64.cu"
#include "cuda/sm80/instances/float16_128.cu"
#include "cuda/sm80/instances/float16_256.cu"
#include "cuda/sm80/instances/float16_64.cu"
#include "cuda/sm90/instances/bfloat16_128.cu"
#include "cuda/sm90/instances/bfloat16_64.cu"
#include "cuda/sm90/instances/float16_128.cu"
#include "cuda/sm90/instances/float16_64.cu"
