#include "cuda/any_arch/slab_sum.cuh"
#include "cuda/sm80/grad_mask.cuh"
#include "instance.h"

namespace adasplash2::cuda::one_instance {

void grad_mask(const Backward& call, const BackwardWorkspace& workspace) { Instance::grad_mask(call, workspace); }

}  // namespace adasplash2::cuda::one_instance
