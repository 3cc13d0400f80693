// wgmma: matrix products of four warps, asynchronous.
//
// What the PTX ISA leaves open is decided thus: an operation belongs to the warpgroup. It can complete once all four
// warps have issued it, and then it is complete for all four, so one warp's wait covers the others' reads of shared
// memory.
#pragma once

#include "matrix.h"
#include "ptx.h"
#include "scheduler.h"

namespace simt {

// Parameter: N, the element type, and whether A comes from registers.
constexpr int wgmma_parameter(int n, MatrixElement element, bool is_a_in_registers) {
  return n | static_cast<int>(element) << 12 | static_cast<int>(is_a_in_registers) << 16;
}
void execute_wgmma(const PtxCall& call);
void execute_wgmma_fence(const PtxCall& call);
void execute_wgmma_commit(const PtxCall& call);
void execute_wgmma_wait(const PtxCall& call);

void reset_wgmma();
void check_no_wgmma_at_exit(const Thread& thread);
// An ordinary access to the current thread's stack: fails if it is an accumulator of a wgmma in flight.
void check_accumulators(const void* address, bool is_write, Site site);

}  // namespace simt
