// Exact counts of what the kernels did, summed over launches until reset. All are independent of the schedule.
#pragma once

#include <cstdint>

namespace simt {

// Instructions count once a warp (wgmma: once a warpgroup, barriers: once when they complete), atomics once a thread.
// The *_load_bytes and *_store_bytes are seen in instrumented builds only.
// clang-format off
#define SIMT_COUNTERS(X)                                                                      \
  X(blocks)                                                                                   \
  X(mma) X(wgmma) X(wgmma_macs)                                                               \
  X(ldmatrix) X(ldmatrix_wavefronts) X(stmatrix) X(stmatrix_wavefronts)                       \
  X(cp_async_bytes) X(tma_load_bytes) X(tma_store_bytes) X(tma_reduce_bytes)                  \
  X(shuffles) X(votes) X(reductions) X(warp_syncs)                                            \
  X(block_syncs) X(named_barriers) X(mbarrier_arrivals) X(mbarrier_phases)                    \
  X(shared_atomics) X(global_atomics)                                                         \
  X(shared_load_bytes) X(shared_store_bytes) X(global_load_bytes) X(global_store_bytes)
// clang-format on

#define SIMT_DECLARE(name) uint64_t name = 0;
struct Counters {
  SIMT_COUNTERS(SIMT_DECLARE)
};
#undef SIMT_DECLARE

extern Counters counters;

}  // namespace simt
