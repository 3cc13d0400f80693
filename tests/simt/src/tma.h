// TMA: boxes of tensors between global and shared memory, carried out when nothing else can run (loads) or when the
// issuing thread waits for them (stores, reductions).
#pragma once

#include "ptx.h"
#include "scheduler.h"

namespace simt {

// The XOR of TMA's and wgmma's shared-memory layouts: on absolute address bits, chunks of 16 bytes.
inline uint32_t swizzled(uint32_t address, uint32_t swizzle_bytes) {
  if (swizzle_bytes < 32) return address;
  const uint32_t chunk_mask = swizzle_bytes / 16 - 1;
  return address ^ (address >> 7 & chunk_mask) << 4;
}

// Parameter of the three: the number of dimensions.
void execute_tma_load(const PtxCall& call);
void execute_tma_store(const PtxCall& call);
void execute_tma_reduce_add(const PtxCall& call);
void execute_tma_prefetch(const PtxCall& call);
void execute_tma_store_commit(const PtxCall& call);
void execute_tma_store_wait(const PtxCall& call);

void reset_tma();
// False if none is in flight.
bool complete_one_tma_load();
void check_no_stores_at_exit(const Thread& thread);
void check_no_loads_at_exit();

}  // namespace simt
