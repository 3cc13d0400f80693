// The instance, of which a unit makes one pass. launch.cuh includes the kernels of all passes: it is left out where the
// emulator asks what a unit uses, so each unit includes itself what its pass is made of.
#pragma once

#include <cuda_bf16.h>

#include "../passes.h"
#include "cuda/launch_pass.cuh"

#ifndef SIMT_WHAT_IS_USED
#include "cuda/sm80/launch.cuh"

namespace adasplash2::cuda::one_instance {

using Instance = sm80::Instance<__nv_bfloat16, ONE_INSTANCE_HEAD_DIM>;

}  // namespace adasplash2::cuda::one_instance
#endif
