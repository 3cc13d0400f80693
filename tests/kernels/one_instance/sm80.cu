// One instance of the sm80 path, quick to build, for the tests that build a patched copy of the kernels for each bug:
// the layer that launches it. Each of its passes is a unit in sm80/, so that a bug costs the passes that it is in.
#include "../api.h"
#include "cuda/launch.cpp"
#include "passes.h"

namespace adasplash2::cuda::sm80 {

const Passes bfloat16_64{DataType::kBFloat16,
                         ONE_INSTANCE_HEAD_DIM,
                         nullptr,
                         nullptr,
                         one_instance::scan,
                         one_instance::output,
                         one_instance::delta,
                         one_instance::grad_query,
                         one_instance::grad_key_value,
                         one_instance::grad_alpha,
                         one_instance::grad_mask};
const Passes bfloat16_128{}, bfloat16_256{};
const Passes float16_64{}, float16_128{}, float16_256{};
const Passes float32_64{}, float32_128{}, float32_256{};

}  // namespace adasplash2::cuda::sm80
