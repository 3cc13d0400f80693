#include <cuda_fp16.h>

#include "cuda/sm80/launch.cuh"

namespace adasplash2::cuda::sm80 {

const Passes float16_256{DataType::kFloat16, 256, Instance<__half, 256>::forward, Instance<__half, 256>::backward};

}  // namespace adasplash2::cuda::sm80
