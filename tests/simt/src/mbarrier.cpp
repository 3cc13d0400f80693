#include "mbarrier.h"

#include <cstring>
#include <map>

#include "actors.h"
#include "counters.h"
#include "shadow.h"

namespace simt {

namespace {

// Kept beside shared memory, whose 8 bytes are opaque to the kernel.
struct Mbarrier {
  int num_arrivals = 0, pending_arrivals = 0;
  int64_t pending_bytes = 0;  // negative while copies completed before they were announced
  uint32_t phase = 0;
  int index = 0;  // among the block's mbarriers
  std::vector<Thread*> waiting;
  // What the arrivals of the current phase know, and what those of all ended phases knew.
  ClockJoin arriving, ended;
  // The initialisation: others must be ordered after it, and the async proxy must see it.
  int initialiser = 0;
  Epoch init_epoch = 0;
  bool is_init_fenced = false;
  Site init_site = nullptr;
};
std::map<uint32_t, Mbarrier> mbarriers;  // by shared address
int num_initialised = 0;

std::string describe(const Wait& wait) {
  const Mbarrier& barrier = mbarriers.at(wait.object);
  char text[160];
  snprintf(text, sizeof text,
           "mbarrier at shared offset %u, parity %u; phase %u, pending arrivals %d of %d, pending bytes %lld",
           wait.object - kSharedWindow, wait.parity, barrier.phase, barrier.pending_arrivals, barrier.num_arrivals,
           static_cast<long long>(barrier.pending_bytes));
  return text;
}

Mbarrier& find(uint32_t address, const char* what, Site site) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) {
    fail("%s at %s: no mbarrier was initialised at shared offset %d", what, source_line(site).c_str(),
         static_cast<int>(address - kSharedWindow));
  }
  Mbarrier& barrier = found->second;
  if (options.check_races && current != nullptr && !current->clock.knows(barrier.initialiser, barrier.init_epoch)) {
    fail("RACE: %s at %s uses the mbarrier at shared offset %u without a barrier after its initialisation at %s", what,
         source_line(site).c_str(), address - kSharedWindow, source_line(barrier.init_site).c_str());
  }
  return barrier;
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending_arrivals != 0 || barrier.pending_bytes != 0) return;
  ++counters.mbarrier_phases;
  ++barrier.phase;
  barrier.pending_arrivals = barrier.num_arrivals;
  if (options.check_races) {
    barrier.ended.set(tma_actor(barrier.index), barrier.phase);
    barrier.ended.add(barrier.arriving);
  }
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

void announce_bytes(Mbarrier& barrier, uint32_t bytes, Site site) {
  constexpr uint32_t kMaxTransactionBytes = (1 << 20) - 1;
  if (bytes > kMaxTransactionBytes) {
    fail("mbarrier.expect_tx at %s: %u bytes, and a phase counts to 2^20 - 1", source_line(site).c_str(), bytes);
  }
  barrier.pending_bytes += bytes;
}

bool has_phase_ended(const Mbarrier& barrier, uint32_t parity) { return (barrier.phase & 1) != parity; }

// A waiter that got through knows what the arrivals knew.
void pass(Mbarrier& barrier) {
  if (options.check_races) barrier.ended.merge_into(current->clock);
}

void check_parity(const PtxCall& call) {
  if (call.u32(2) > 1) fail("mbarrier wait at %s: parity %u", source_line(call.site).c_str(), call.u32(2));
}

}  // namespace

void execute_mbarrier_init(const PtxCall& call) {
  const uint32_t address = call.u32(0);
  const int num_arrivals = call.s32(1);
  if (address % 8 != 0) fail("MISALIGNED mbarrier.init at %s", source_line(call.site).c_str());
  if (num_arrivals < 1 || num_arrivals >= 1 << 20) {
    fail("mbarrier.init at %s: the count %d is not in 1 .. 2^20 - 1", source_line(call.site).c_str(), num_arrivals);
  }
  if (mbarriers.count(address) != 0) {
    fail("mbarrier.init at %s: shared offset %u holds an mbarrier since %s", source_line(call.site).c_str(),
         address - kSharedWindow, source_line(mbarriers[address].init_site).c_str());
  }
  if (num_initialised == kMaxMbarriers) fail("more than %d mbarriers in a block", kMaxMbarriers);
  std::memset(shared_pointer(address, 8, call.site), 0xff, 8);
  record_write(*current, address, 8, call.site);
  Mbarrier& barrier = mbarriers[address];
  barrier.num_arrivals = barrier.pending_arrivals = num_arrivals;
  barrier.index = num_initialised++;
  barrier.initialiser = current->index;
  barrier.init_epoch = current->clock.epoch;
  barrier.init_site = call.site;
}

void execute_mbarrier_inval(const PtxCall& call) {
  find(call.u32(0), "mbarrier.inval", call.site);
  mbarriers.erase(call.u32(0));
}

void execute_mbarrier_arrive(const PtxCall& call) {
  Mbarrier& barrier = find(call.u32(0), "mbarrier.arrive", call.site);
  ++counters.mbarrier_arrivals;
  if (barrier.pending_arrivals == 0) {
    fail("mbarrier.arrive at %s: more arrivals in phase %u than the %d of its initialisation at %s",
         source_line(call.site).c_str(), barrier.phase, barrier.num_arrivals, source_line(barrier.init_site).c_str());
  }
  if (options.check_races) {
    barrier.arriving.add(current->clock);
    current->clock.epoch = next_epoch();
  }
  if (call.parameter() != 0) announce_bytes(barrier, call.u32(1), call.site);
  --barrier.pending_arrivals;
  end_phase_if_complete(barrier);
}

void execute_mbarrier_expect_tx(const PtxCall& call) {
  Mbarrier& barrier = find(call.u32(0), "mbarrier.expect_tx", call.site);
  announce_bytes(barrier, call.u32(1), call.site);
}

void execute_mbarrier_test_wait(const PtxCall& call) {
  check_parity(call);
  Mbarrier* barrier = &find(call.u32(1), "mbarrier.test_wait", call.site);
  if (!has_phase_ended(*barrier, call.u32(2))) {
    barrier->waiting.push_back(current);
    poll_for({"mbarrier test_wait", call.site, &describe, call.u32(1), call.u32(2)});
    barrier = &find(call.u32(1), "mbarrier.test_wait", call.site);
    std::vector<Thread*>& waiting = barrier->waiting;
    for (size_t i = 0; i < waiting.size(); ++i) {
      if (waiting[i] == current) waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(i--));
    }
  }
  const bool has_ended = has_phase_ended(*barrier, call.u32(2));
  if (has_ended) pass(*barrier);
  call.set_u32(0, has_ended);
}

void execute_mbarrier_try_wait(const PtxCall& call) {
  check_parity(call);
  Mbarrier& barrier = find(call.u32(1), "mbarrier.try_wait", call.site);
  // The hardware's time limit: rarely, give up at once. A kernel has to come back.
  if (!has_phase_ended(barrier, call.u32(2)) && block.flip_early()) {
    call.set_u32(0, false);
    return;
  }
  while (!has_phase_ended(barrier, call.u32(2))) {
    barrier.waiting.push_back(current);
    wait_for({"mbarrier wait", call.site, &describe, call.u32(1), call.u32(2)});
  }
  pass(barrier);
  call.set_u32(0, true);
}

void execute_fence_mbarrier_init(const PtxCall&) {
  for (auto& [address, barrier] : mbarriers) {
    if (barrier.initialiser == current->index) barrier.is_init_fenced = true;
  }
}

void execute_fence_proxy_async(const PtxCall&) {
  if (!options.check_races) return;
  ThreadClock& clock = current->clock;
  clock.fenced_others = clock.others;
  clock.fenced_epoch = clock.epoch;
  clock.epoch = next_epoch();  // what follows the fence is not fenced
}

void reset_mbarriers() {
  mbarriers.clear();
  num_initialised = 0;
}

void check_mbarrier_for_load(uint32_t address, Site site) {
  const Mbarrier& barrier = find(address, "TMA load", site);
  if (options.check_races && !barrier.is_init_fenced &&
      !current->clock.async_proxy_knows(barrier.initialiser, barrier.init_epoch)) {
    fail(
        "MISSING fence.mbarrier_init (or fence.proxy.async) between the initialisation of the mbarrier at %s and the "
        "TMA load at %s",
        source_line(barrier.init_site).c_str(), source_line(site).c_str());
  }
}

TmaCompletion pending_completion(uint32_t address) {
  const Mbarrier& barrier = mbarriers.at(address);
  return {tma_actor(barrier.index), barrier.phase + 1};
}

void complete_transaction(uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = mbarriers.at(address);
  barrier.pending_bytes -= bytes;
  end_phase_if_complete(barrier);
}

}  // namespace simt
