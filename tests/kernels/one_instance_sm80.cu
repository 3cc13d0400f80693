// One instance of the sm80 path, quick to build: for the tests that build a patched copy of the kernels for each bug.
#include "api.h"
#include "cuda/launch.cpp"
#include "cuda/sm80/instances/bfloat16_64.cu"

namespace adasplash2::cuda::sm80 {

const Passes bfloat16_128{}, bfloat16_256{};
const Passes float16_64{}, float16_128{}, float16_256{};
const Passes float32_64{}, float32_128{}, float32_256{};

}  // namespace adasplash2::cuda::sm80
