#include <cuda_fp16.h>

#include "cuda/sm80/launch.cuh"

namespace adasplash2::cuda::sm80 {

const Passes float16_128{DataType::kFloat16, 128, Instance<__half, 128>::forward, Instance<__half, 128>::backward};

}  // namespace adasplash2::cuda::sm80
