// cp.async: copies of single threads, carried out at the wait that covers them.
#pragma once

#include "ptx.h"
#include "scheduler.h"

namespace simt {

void execute_cp_async(const PtxCall& call);
void execute_cp_async_commit(const PtxCall& call);
void execute_cp_async_wait(const PtxCall& call);

void reset_cp_async();
void check_no_copies_at_exit(const Thread& thread);

}  // namespace simt
