// __syncthreads and the 16 named barriers of a block.
#pragma once

#include "ptx.h"
#include "scheduler.h"

namespace simt {

void execute_bar_sync(const PtxCall& call);
void execute_bar_arrive(const PtxCall& call);

void reset_barriers();
// __syncthreads waits for the live threads only: a thread's exit may be what the others waited for.
void release_barrier_at_exit();

}  // namespace simt
