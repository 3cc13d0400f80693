#include "cuda/sm80/scan.cuh"
#include "instance.h"

namespace adasplash2::cuda::one_instance {

void scan(const Forward& call, const ForwardWorkspace& workspace) { Instance::scan(call, workspace); }

}  // namespace adasplash2::cuda::one_instance
