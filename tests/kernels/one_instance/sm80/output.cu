#include "cuda/sm80/output.cuh"
#include "instance.h"

namespace adasplash2::cuda::one_instance {

void output(const Forward& call, const ForwardWorkspace& workspace) { Instance::output(call, workspace); }

}  // namespace adasplash2::cuda::one_instance
