#include <cuda_bf16.h>

#include "cuda/sm80/launch.cuh"

namespace adasplash2::cuda::sm80 {

const Passes bfloat16_128{DataType::kBFloat16, 128, Instance<__nv_bfloat16, 128>::forward,
                          Instance<__nv_bfloat16, 128>::backward};

}  // namespace adasplash2::cuda::sm80
