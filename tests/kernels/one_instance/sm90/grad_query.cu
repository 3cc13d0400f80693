#include "cuda/sm90/grad_query.cuh"
#include "instance.h"

namespace adasplash2::cuda::one_instance {

void grad_query(const Backward& call, const BackwardWorkspace& workspace) { Instance::grad_query(call, workspace); }

}  // namespace adasplash2::cuda::one_instance
