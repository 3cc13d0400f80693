#include <cuda_bf16.h>

#include "cuda/sm90/launch.cuh"

namespace adasplash2::cuda::sm90 {

const Passes bfloat16_64 = Instance<__nv_bfloat16, 64>::passes(DataType::kBFloat16);

}  // namespace adasplash2::cuda::sm90
