// Reductions over a row of an accumulator, whose columns lie in the four lanes of a quad, and over a warp.
#pragma once

#include <cuda_runtime.h>

namespace adasplash2::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// Over the warp, for values that are not negative: their bits order like integers, and integers have one instruction.
__device__ __forceinline__ float warp_max_of_positive(float value) {
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(value)));
}
__device__ __forceinline__ float warp_min_of_positive(float value) {
  return __uint_as_float(__reduce_min_sync(kAllLanes, __float_as_uint(value)));
}

}  // namespace adasplash2::cuda
