// A ring of shared-memory stages between one producing thread and consuming warps.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace adasplash2::cuda::sm90 {

// The barriers: full[kStages], then empty[kStages], 8 bytes each. A stage is full once its bytes have come, empty once
// every consumer has arrived.
template <int kStages>
struct Ring {
  static constexpr int kBarrierBytes = 2 * kStages * 8;
  uint32_t s_barriers;

  __device__ __forceinline__ uint32_t full(int stage) const { return s_barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return s_barriers + (kStages + stage) * 8; }

  // One thread; fence_mbarrier_init() and a barrier of the block follow.
  __device__ __forceinline__ void init(int num_consumer_arrivals) const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), num_consumer_arrivals);
    }
  }

  // Producer: waits until the stage is free.
  __device__ __forceinline__ void wait_free(int stage, uint32_t parity) const {
    ptx::mbarrier_wait(empty(stage), parity ^ 1);
  }
  // Producer: announces what will come, and returns the barrier to load on.
  __device__ __forceinline__ uint32_t announce(int stage, uint32_t bytes) const {
    ptx::mbarrier_arrive_expect_tx(full(stage), bytes);
    return full(stage);
  }
  __device__ __forceinline__ uint32_t acquire(int stage, uint32_t parity, uint32_t bytes) const {
    wait_free(stage, parity);
    return announce(stage, bytes);
  }
  // Consumer.
  __device__ __forceinline__ void wait(int stage, uint32_t parity) const { ptx::mbarrier_wait(full(stage), parity); }
  // One lane of each consuming warp (or as many as init() was told).
  __device__ __forceinline__ void release(int stage) const { ptx::mbarrier_arrive(empty(stage)); }
};

// Where a producer or a consumer stands in the ring.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace adasplash2::cuda::sm90
