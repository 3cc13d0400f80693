// One instance of the sm90 path, quick to build: for the tests that build a patched copy of the kernels for each bug.
#include "api.h"
#define ADASPLASH2_CUDA_SM90
#include "cuda/launch.cpp"
#include "cuda/sm80/launch.cuh"
#ifndef ONE_INSTANCE_HEAD_DIM
#define ONE_INSTANCE_HEAD_DIM 64
#endif
#if ONE_INSTANCE_HEAD_DIM == 64
#include "cuda/sm90/instances/bfloat16_64.cu"
#else
#include "cuda/sm90/instances/bfloat16_128.cu"
#endif

namespace adasplash2::cuda::sm80 {

// delta is the one pass that sm90 takes from sm80.
constexpr Passes only_delta() {
  Passes passes{DataType::kBFloat16, ONE_INSTANCE_HEAD_DIM};
  passes.delta = Instance<__nv_bfloat16, ONE_INSTANCE_HEAD_DIM>::delta;
  return passes;
}

#if ONE_INSTANCE_HEAD_DIM == 64
const Passes bfloat16_64 = only_delta(), bfloat16_128{};
#else
const Passes bfloat16_64{}, bfloat16_128 = only_delta();
#endif
const Passes bfloat16_256{};
const Passes float16_64{}, float16_128{}, float16_256{};
const Passes float32_64{}, float32_128{}, float32_256{};

}  // namespace adasplash2::cuda::sm80

namespace adasplash2::cuda::sm90 {

#if ONE_INSTANCE_HEAD_DIM == 64
const Passes bfloat16_128{};
#else
const Passes bfloat16_64{};
#endif
const Passes float16_64{}, float16_128{};

}  // namespace adasplash2::cuda::sm90
