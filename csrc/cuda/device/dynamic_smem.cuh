// The block's dynamic shared memory: the only shared memory that kernels use, so that the emulator sees every access.
#pragma once

#include <cstdint>

namespace adasplash2 {

// Aligned to 1024 bytes, the period of the 128-byte swizzle.
static __device__ __forceinline__ uint8_t* dynamic_smem() {
  extern __shared__ __align__(1024) uint8_t adasplash2_dynamic_smem[];
  return adasplash2_dynamic_smem;
}

}  // namespace adasplash2
