// The actors of the vector clocks: threads first, then stand-ins for what the async proxy does for them.
#pragma once

#include <string>

#include "scheduler.h"

namespace simt {

constexpr int kMaxMbarriers = 64;
constexpr int kMaxWarpgroups = 32;

inline int num_actors() { return static_cast<int>(block.threads.size()) + kMaxMbarriers + kMaxWarpgroups; }
inline int tma_actor(int mbarrier_index) { return static_cast<int>(block.threads.size()) + mbarrier_index; }
inline int wgmma_actor(int warpgroup) { return static_cast<int>(block.threads.size()) + kMaxMbarriers + warpgroup; }

inline std::string actor_name(int actor) {
  const int num_threads = static_cast<int>(block.threads.size());
  if (actor < num_threads) return "thread " + std::to_string(actor);
  if (actor < num_threads + kMaxMbarriers) return "a TMA load";
  return "wgmma of warpgroup " + std::to_string(actor - num_threads - kMaxMbarriers);
}

}  // namespace simt
