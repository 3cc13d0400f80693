#include <cuda_fp16.h>

#include "cuda/sm80/launch.cuh"

namespace adasplash2::cuda::sm80 {

const Passes float16_64 = Instance<__half, 64>::passes(DataType::kFloat16);

}  // namespace adasplash2::cuda::sm80
