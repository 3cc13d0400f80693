#include "cuda/any_arch/row_sum.cuh"
#include "cuda/sm80/grad_alpha.cuh"
#include "instance.h"

namespace adasplash2::cuda::one_instance {

void grad_alpha(const Backward& call, const BackwardWorkspace& workspace) { Instance::grad_alpha(call, workspace); }

}  // namespace adasplash2::cuda::one_instance
