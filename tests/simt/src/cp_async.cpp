#include "cp_async.h"

#include <cstring>

#include "counters.h"
#include "shadow.h"

namespace simt {

namespace {

struct Copy {
  uint32_t destination;
  const uint8_t* source;
  uint32_t bytes, source_bytes;
  int group;
  Site site;
  bool is_done;  // carried out early, yet not to be relied on before the wait
};
struct ThreadCopies {
  std::vector<Copy> in_flight;
  int open_group = 0;
};
std::vector<ThreadCopies> copies;  // by thread

void carry_out(const Copy& copy) {
  uint8_t* destination = shared_pointer(copy.destination, copy.bytes, copy.site);
  std::memcpy(destination, copy.source, copy.source_bytes);
  std::memset(destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

void execute_cp_async(const PtxCall& call) {
  Copy copy{call.u32(0),
            reinterpret_cast<const uint8_t*>(call.u64(1)),
            call.u32(2),
            call.u32(3),
            copies[current->index].open_group,
            call.site,
            false};
  const bool bypasses_l1 = call.parameter() != 0;  // .cg
  const bool is_size_known = copy.bytes == 16 || (!bypasses_l1 && (copy.bytes == 4 || copy.bytes == 8));
  if (!is_size_known) fail("cp.async at %s: %u bytes", source_line(call.site).c_str(), copy.bytes);
  if (copy.source_bytes > copy.bytes) {
    fail("cp.async at %s: %u source bytes of %u", source_line(call.site).c_str(), copy.source_bytes, copy.bytes);
  }
  if (copy.destination % copy.bytes != 0 || reinterpret_cast<uintptr_t>(copy.source) % copy.bytes != 0) {
    fail("MISALIGNED cp.async at %s: shared 0x%x from %p, not multiples of %u", source_line(call.site).c_str(),
         copy.destination, static_cast<const void*>(copy.source), copy.bytes);
  }
  uint8_t* destination = shared_pointer(copy.destination, copy.bytes, call.site);
  if (copy.source_bytes > 0) check_global(copy.source, copy.source_bytes, "read by cp.async", call.site);
  counters.cp_async_bytes += copy.source_bytes;
  begin_async_write(*current, copy.destination, copy.bytes, call.site, Proxy::kGeneric);
  if (block.flip_early()) {
    carry_out(copy);
    copy.is_done = true;
  } else {
    std::memset(destination, 0xff, copy.bytes);  // what was there is gone, what comes is not here yet
  }
  copies[current->index].in_flight.push_back(copy);
}

void execute_cp_async_commit(const PtxCall&) { ++copies[current->index].open_group; }

void execute_cp_async_wait(const PtxCall& call) {
  ThreadCopies& mine = copies[current->index];
  size_t num_left = 0;
  for (const Copy& copy : mine.in_flight) {
    if (copy.group >= mine.open_group - call.s32(0)) {
      mine.in_flight[num_left++] = copy;
      continue;
    }
    if (!copy.is_done) carry_out(copy);
    end_async_write(copy.destination, copy.bytes, current->index, current->clock.epoch, copy.site, Proxy::kGeneric);
  }
  mine.in_flight.resize(num_left);
}

void reset_cp_async() { copies.assign(block.threads.size(), ThreadCopies()); }

void check_no_copies_at_exit(const Thread& thread) {
  const std::vector<Copy>& in_flight = copies[thread.index].in_flight;
  if (in_flight.empty()) return;
  fail("EXIT with %zu cp.async in flight, issued at %s", in_flight.size(), source_line(in_flight[0].site).c_str());
}

}  // namespace simt
