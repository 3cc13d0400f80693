// Moves registers between warpgroups (sm_90a). PTX ISA: "Miscellaneous Instructions: setmaxnreg".
#pragma once

#include <cuda_runtime.h>

#include <ptx_macro.cuh>

namespace adasplash2::ptx {

// Every warp of the warpgroup executes the same one.
template <int kRegisters>
static __device__ __forceinline__ void setmaxnreg_increase() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "a multiple of 8 from 24 to 256");
  PTX_MEMORY("setmaxnreg.inc.sync.aligned.u32 %0;", (), (PTX_IN_N(kRegisters)));
}

template <int kRegisters>
static __device__ __forceinline__ void setmaxnreg_decrease() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "a multiple of 8 from 24 to 256");
  PTX_MEMORY("setmaxnreg.dec.sync.aligned.u32 %0;", (), (PTX_IN_N(kRegisters)));
}

}  // namespace adasplash2::ptx
