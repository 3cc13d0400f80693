#include <cuda_fp16.h>

#include "cuda/sm80/launch.cuh"

namespace adasplash2::cuda::sm80 {

const Passes float16_64{DataType::kFloat16, 64, Instance<__half, 64>::forward, Instance<__half, 64>::backward};

}  // namespace adasplash2::cuda::sm80
