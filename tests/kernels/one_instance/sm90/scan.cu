#include "cuda/sm90/scan.cuh"
#include "cuda/sm90/tensor_maps.cuh"
#include "instance.h"

namespace adasplash2::cuda::one_instance {

void scan(const Forward& call, const ForwardWorkspace& workspace) { Instance::scan(call, workspace); }

}  // namespace adasplash2::cuda::one_instance
