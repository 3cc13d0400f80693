// The same of the sm90 path. What has the name of an instance is that with ONE_INSTANCE_HEAD_DIM, whatever that is: the
// launch layer goes by what it says of itself.
#define ADASPLASH2_CUDA_SM90
#include "../api.h"
#include "cuda/launch.cpp"
#include "passes.h"

namespace adasplash2::cuda::sm80 {

// delta is the one pass that sm90 takes from sm80.
const Passes bfloat16_64{DataType::kBFloat16, ONE_INSTANCE_HEAD_DIM, nullptr, nullptr, nullptr, nullptr,
                         one_instance::delta};
const Passes bfloat16_128{}, bfloat16_256{};
const Passes float16_64{}, float16_128{}, float16_256{};
const Passes float32_64{}, float32_128{}, float32_256{};

}  // namespace adasplash2::cuda::sm80

namespace adasplash2::cuda::sm90 {

const Passes bfloat16_64{DataType::kBFloat16,
                         ONE_INSTANCE_HEAD_DIM,
                         [] { return true; },  // the emulated device is a Hopper
                         nullptr,
                         one_instance::scan,
                         one_instance::output,
                         nullptr,
                         one_instance::grad_query,
                         one_instance::grad_key_value};
const Passes bfloat16_128{};
const Passes float16_64{}, float16_128{};

}  // namespace adasplash2::cuda::sm90
