// Addresses in the shared window. PTX ISA: "State Spaces, Types, and Variables: Shared State Space".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace adasplash2::ptx {

// The 32-bit address that the wrappers of this folder take for shared memory.
static __device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace adasplash2::ptx
