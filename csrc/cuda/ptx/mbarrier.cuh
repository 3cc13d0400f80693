// Barriers in shared memory that count arrivals and bytes (sm_90).
// PTX ISA: "Parallel Synchronization and Communication Instructions: mbarrier".
//
// A phase ends when all expected arrivals have come and the transaction count is back at zero. A fresh barrier is in
// phase 0, so waiting for parity 1 returns at once: the usual start of a producer.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <ptx_macro.cuh>

namespace adasplash2::ptx {

static __device__ __forceinline__ void mbarrier_init(uint32_t mbarrier, int num_arrivals) {
  PTX_MEMORY("mbarrier.init.shared::cta.b64 [%0], %1;", (), (PTX_IN_R(mbarrier), PTX_IN_R(num_arrivals)));
}

// Gives the 8 bytes back to ordinary use.
static __device__ __forceinline__ void mbarrier_inval(uint32_t mbarrier) {
  PTX_MEMORY("mbarrier.inval.shared::cta.b64 [%0];", (), (PTX_IN_R(mbarrier)));
}

static __device__ __forceinline__ void mbarrier_arrive(uint32_t mbarrier) {
  PTX_MEMORY("mbarrier.arrive.shared::cta.b64 _, [%0];", (), (PTX_IN_R(mbarrier)));
}

// Announces `bytes` of asynchronous copies to this phase, and arrives.
static __device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes) {
  PTX_MEMORY("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;", (), (PTX_IN_R(mbarrier), PTX_IN_R(bytes)));
}

static __device__ __forceinline__ void mbarrier_expect_tx(uint32_t mbarrier, uint32_t bytes) {
  PTX_MEMORY("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;", (), (PTX_IN_R(mbarrier), PTX_IN_R(bytes)));
}

// Has the phase of this parity ended? Does not wait.
static __device__ __forceinline__ bool mbarrier_test_wait(uint32_t mbarrier, uint32_t parity) {
  uint32_t done;
  PTX_MEMORY(
      "{.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;}",
      (PTX_OUT_R(done)), (PTX_IN_R(mbarrier), PTX_IN_R(parity)));
  return done != 0;
}

// The same, but the hardware may suspend the thread for a while first.
static __device__ __forceinline__ bool mbarrier_try_wait(uint32_t mbarrier, uint32_t parity) {
  uint32_t done;
  PTX_MEMORY(
      "{.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;}",
      (PTX_OUT_R(done)), (PTX_IN_R(mbarrier), PTX_IN_R(parity)));
  return done != 0;
}

static __device__ __forceinline__ void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
  while (!mbarrier_try_wait(mbarrier, parity)) {
  }
}

}  // namespace adasplash2::ptx
