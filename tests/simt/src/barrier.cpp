#include "barrier.h"

#include <array>

#include "counters.h"

namespace simt {

namespace {

constexpr int kAllThreads = -1;

struct Barrier {
  int arrived = 0, expected = 0;  // expected: a count, or kAllThreads
  Site site = nullptr;            // of the first arrival
  std::vector<Thread*> waiting;
  ClockJoin join;
};
std::array<Barrier, 16> barriers;

int needed(const Barrier& barrier) { return barrier.expected == kAllThreads ? block.num_alive : barrier.expected; }

std::string describe(const Wait& wait) {
  const Barrier& barrier = barriers[wait.object];
  return "barrier " + std::to_string(wait.object) + ": " + std::to_string(barrier.arrived) + " of " +
         std::to_string(needed(barrier)) + " arrived";
}

void complete(Barrier& barrier) {
  ++(barrier.expected == kAllThreads ? counters.block_syncs : counters.named_barriers);
  const Epoch epoch = options.check_races ? next_epoch() : 0;
  for (Thread* thread : barrier.waiting) {
    if (options.check_races) {
      barrier.join.publish_to(thread->clock);
      thread->clock.epoch = epoch;
    }
    wake(*thread);
  }
  barrier.arrived = 0;
  barrier.waiting.clear();
  barrier.join.clear();
}

void arrive(int id, int expected, bool waits, Site site) {
  if (id < 0 || id > 15) fail("barrier %d at %s: ids go from 0 to 15", id, source_line(site).c_str());
  if (expected != kAllThreads && (expected <= 0 || expected % kWarpSize != 0)) {
    fail("barrier %d at %s: the count %d is no positive multiple of 32", id, source_line(site).c_str(), expected);
  }
  Barrier& barrier = barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.site = site;
  } else if (barrier.expected != expected) {
    fail("barrier %d: count %d at %s, but %d at %s", id, expected, source_line(site).c_str(), barrier.expected,
         source_line(barrier.site).c_str());
  }
  ++barrier.arrived;
  if (options.check_races) {
    barrier.join.add(current->clock);
    if (!waits) current->clock.epoch = next_epoch();
  }
  if (waits) barrier.waiting.push_back(current);
  if (barrier.arrived >= needed(barrier)) {
    complete(barrier);
  } else if (waits) {
    wait_for({"barrier", site, &describe, static_cast<uint32_t>(id)});
  }
}

}  // namespace

void sync_threads() { arrive(0, kAllThreads, true, __builtin_return_address(0)); }

void execute_bar_sync(const PtxCall& call) { arrive(call.s32(0), call.s32(1), true, call.site); }
void execute_bar_arrive(const PtxCall& call) { arrive(call.s32(0), call.s32(1), false, call.site); }

void reset_barriers() { barriers = {}; }

void release_barrier_at_exit() {
  Barrier& barrier = barriers[0];
  if (barrier.arrived > 0 && barrier.expected == kAllThreads && barrier.arrived >= block.num_alive) complete(barrier);
}

}  // namespace simt
