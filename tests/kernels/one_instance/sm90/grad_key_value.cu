#include "cuda/sm90/grad_key_value.cuh"
#include "cuda/sm90/tensor_maps.cuh"
#include "instance.h"

namespace adasplash2::cuda::one_instance {

void grad_key_value(const Backward& call, const BackwardWorkspace& workspace) {
  Instance::grad_key_value(call, workspace);
}

}  // namespace adasplash2::cuda::one_instance
