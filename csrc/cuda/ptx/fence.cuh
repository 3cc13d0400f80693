// Order between the generic proxy (ordinary loads and stores) and the async proxy (TMA, wgmma operands) (sm_90).
// PTX ISA: "Parallel Synchronization and Communication Instructions: membar, fence".
#pragma once

#include <cuda_runtime.h>

#include <ptx_macro.cuh>

namespace adasplash2::ptx {

// Shared memory that this thread has written, or seen written, by ordinary stores becomes visible to TMA and wgmma.
// The thread that wrote executes it, before the barrier that hands the data over.
static __device__ __forceinline__ void fence_proxy_async() { PTX_MEMORY("fence.proxy.async.shared::cta;", (), ()); }

// Makes this thread's mbarrier_init visible to the async proxy; a barrier for the other threads follows.
static __device__ __forceinline__ void fence_mbarrier_init() {
  PTX_MEMORY("fence.mbarrier_init.release.cluster;", (), ());
}

}  // namespace adasplash2::ptx
