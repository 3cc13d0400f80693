#include "cuda/sm80/launch.cuh"

namespace adasplash2::cuda::sm80 {

const Passes float32_128 = Instance<float, 128>::passes(DataType::kFloat32);

}  // namespace adasplash2::cuda::sm80
