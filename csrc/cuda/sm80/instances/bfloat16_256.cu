#include <cuda_bf16.h>

#include "cuda/sm80/launch.cuh"

namespace adasplash2::cuda::sm80 {

const Passes bfloat16_256{DataType::kBFloat16, 256, Instance<__nv_bfloat16, 256>::forward,
                          Instance<__nv_bfloat16, 256>::backward};

}  // namespace adasplash2::cuda::sm80
