// The passes of one instance on Hopper: wgmma, TMA, warp specialisation (sm_90a).
#pragma once

#include <cuda_runtime.h>

#include <launch_kernel.cuh>

#include "cuda/launch_pass.cuh"
#include "cuda/passes.h"

namespace adasplash2::cuda::sm90 {

// sm_90a is one generation: neither an older nor a newer GPU has its instructions.
inline bool runs_here() {
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
}

template <typename Element, int kHeadDim>
struct Instance {
  static constexpr Passes passes(DataType dtype) {
    return {dtype, kHeadDim, runs_here, nullptr, nullptr, nullptr, nullptr, nullptr};
  }
};

}  // namespace adasplash2::cuda::sm90
