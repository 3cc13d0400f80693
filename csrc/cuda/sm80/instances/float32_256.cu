#include "cuda/sm80/launch.cuh"

namespace adasplash2::cuda::sm80 {

const Passes float32_256 = Instance<float, 256>::passes(DataType::kFloat32);

}  // namespace adasplash2::cuda::sm80
