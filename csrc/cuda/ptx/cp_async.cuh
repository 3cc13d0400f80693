// Asynchronous copies, global to shared, of the issuing thread (sm_80).
// PTX ISA: "Data Movement and Conversion Instructions: Asynchronous copy" (cp.async, .commit_group, .wait_group).
//
// A copy is visible to the issuing thread after the wait that covers it, to others after a barrier that follows the
// wait.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <ptx_macro.cuh>

namespace adasplash2::ptx {

// 16 bytes past L1; both addresses 16-byte aligned. The last 16 - source_bytes are written as zero, and nothing is read
// from source at or past source_bytes (0 = do not read at all).
static __device__ __forceinline__ void cp_async_16(uint32_t destination, const void* source, int source_bytes = 16) {
  PTX_MEMORY("cp.async.cg.shared.global [%0], [%1], 16, %2;", (),
             (PTX_IN_R(destination), PTX_IN_L(source), PTX_IN_R(source_bytes)));
}

// 8 and 4 bytes, through L1: for rows that are not 16-byte aligned.
static __device__ __forceinline__ void cp_async_8(uint32_t destination, const void* source, int source_bytes = 8) {
  PTX_MEMORY("cp.async.ca.shared.global [%0], [%1], 8, %2;", (),
             (PTX_IN_R(destination), PTX_IN_L(source), PTX_IN_R(source_bytes)));
}

static __device__ __forceinline__ void cp_async_4(uint32_t destination, const void* source, int source_bytes = 4) {
  PTX_MEMORY("cp.async.ca.shared.global [%0], [%1], 4, %2;", (),
             (PTX_IN_R(destination), PTX_IN_L(source), PTX_IN_R(source_bytes)));
}

// Closes the group of all copies issued since the last commit; an empty group counts too.
static __device__ __forceinline__ void cp_async_commit() { PTX_MEMORY("cp.async.commit_group;", (), ()); }

// Waits until at most kPending of the newest groups are in flight.
template <int kPending>
static __device__ __forceinline__ void cp_async_wait() {
  PTX_MEMORY("cp.async.wait_group %0;", (), (PTX_IN_N(kPending)));
}

}  // namespace adasplash2::ptx
