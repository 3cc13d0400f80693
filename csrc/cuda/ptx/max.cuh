// The maximum that does not lose a NaN (fmaxf does).
// PTX ISA: "Floating Point Instructions: max" (.NaN: sm_80).
#pragma once

#include <cuda_runtime.h>

#include <ptx_macro.cuh>

namespace adasplash2::ptx {

// NaN if either operand is.
static __device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  PTX("max.NaN.f32 %0, %1, %2;", (PTX_OUT_F(larger)), (PTX_IN_F(a), PTX_IN_F(b)));
  return larger;
}

}  // namespace adasplash2::ptx
