// mbarriers: phases that end when all arrivals have come and all announced bytes were copied.
#pragma once

#include "ptx.h"
#include "scheduler.h"

namespace simt {

void execute_mbarrier_init(const PtxCall& call);
void execute_mbarrier_inval(const PtxCall& call);
void execute_mbarrier_arrive(const PtxCall& call);  // parameter: 1 = .expect_tx
void execute_mbarrier_expect_tx(const PtxCall& call);
void execute_mbarrier_test_wait(const PtxCall& call);
void execute_mbarrier_try_wait(const PtxCall& call);
void execute_fence_mbarrier_init(const PtxCall& call);
void execute_fence_proxy_async(const PtxCall& call);

void reset_mbarriers();

// For TMA loads. The check is that of the issuing thread: it exists, and the async proxy can see it.
void check_mbarrier_for_load(uint32_t address, Site site);
struct TmaCompletion {
  int actor;    // the stand-in that wrote the bytes
  Epoch epoch;  // known to whoever waits for the phase
};
TmaCompletion pending_completion(uint32_t address);
void complete_transaction(uint32_t address, uint32_t bytes);

}  // namespace simt
