// One lane of a converged warp, chosen by the hardware (sm_90).
// PTX ISA: "Parallel Synchronization and Communication Instructions: elect.sync".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <ptx_macro.cuh>

namespace adasplash2::ptx {

// True in exactly one lane, the same one at every call.
static __device__ __forceinline__ bool elect_one() {
  uint32_t is_elected;
  PTX("{.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;}",
      (PTX_OUT_R(is_elected)), ());
  return is_elected != 0;
}

}  // namespace adasplash2::ptx
