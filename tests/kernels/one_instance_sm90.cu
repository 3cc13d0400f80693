// One instance of the sm90 path, quick to build: for the tests that build a patched copy of the kernels for each bug.
#include "api.h"
#define ADASPLASH2_CUDA_SM90
#include "cuda/launch.cpp"
#include "cuda/sm80/launch.cuh"
#include "cuda/sm90/instances/bfloat16_64.cu"

namespace adasplash2::cuda::sm80 {

// delta is the one pass that sm90 takes from sm80.
constexpr Passes only_delta() {
  Passes passes{DataType::kBFloat16, 64};
  passes.delta = Instance<__nv_bfloat16, 64>::delta;
  return passes;
}

const Passes bfloat16_64 = only_delta();
const Passes bfloat16_128{}, bfloat16_256{};
const Passes float16_64{}, float16_128{}, float16_256{};
const Passes float32_64{}, float32_128{}, float32_256{};

}  // namespace adasplash2::cuda::sm80

namespace adasplash2::cuda::sm90 {

const Passes bfloat16_128{}, float16_64{}, float16_128{};

}  // namespace adasplash2::cuda::sm90
