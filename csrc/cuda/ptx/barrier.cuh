// Named barriers: a subset of a block's warps (barrier 0 is __syncthreads).
// PTX ISA: "Parallel Synchronization and Communication Instructions: bar, barrier".
//
// The ids are template parameters: an id in a register makes ptxas reserve all 16 barriers of the block.
#pragma once

#include <cuda_runtime.h>

#include <ptx_macro.cuh>

namespace adasplash2::ptx {

template <int kId, int kNumThreads>
static __device__ __forceinline__ void barrier_sync() {
  static_assert(kId >= 1 && kId < 16, "a block has barriers 0 to 15, and 0 belongs to __syncthreads");
  static_assert(kNumThreads % 32 == 0, "whole warps take part");
  PTX_MEMORY("bar.sync %0, %1;", (), (PTX_IN_N(kId), PTX_IN_N(kNumThreads)));
}

// Counts this thread in without waiting; the threads that wait see what it wrote before.
template <int kId, int kNumThreads>
static __device__ __forceinline__ void barrier_arrive() {
  static_assert(kId >= 1 && kId < 16, "a block has barriers 0 to 15, and 0 belongs to __syncthreads");
  static_assert(kNumThreads % 32 == 0, "whole warps take part");
  PTX_MEMORY("bar.arrive %0, %1;", (), (PTX_IN_N(kId), PTX_IN_N(kNumThreads)));
}

}  // namespace adasplash2::ptx
