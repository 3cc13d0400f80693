#include "cuda/any_arch/delta.cuh"
#include "instance.h"

namespace adasplash2::cuda::one_instance {

void delta(const Backward& call, const BackwardWorkspace& workspace) { Instance::delta(call, workspace); }

}  // namespace adasplash2::cuda::one_instance
