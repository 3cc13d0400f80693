#include "rendezvous.h"

#include <algorithm>
#include <array>

#include "counters.h"

namespace simt {

namespace {

// A meeting under way. A warp may have several at a time, of disjoint masks.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* what = nullptr;
  Site site = nullptr;
  std::array<void*, kWarpSize> arguments{};
};
std::vector<std::vector<Meeting>> meetings;  // by warp

std::string describe(const Wait& wait) {
  for (const Meeting& meeting : meetings[wait.object / kWarpSize]) {
    if ((meeting.arrived >> wait.object % kWarpSize & 1) == 0) continue;
    char text[96];
    snprintf(text, sizeof text, "warp %u: lanes %08x of %08x arrived", wait.object / kWarpSize, meeting.arrived,
             meeting.mask);
    return text;
  }
  return "";
}

Meeting& meeting_of(uint32_t mask, const char* what, Site site, Aligned aligned) {
  std::vector<Meeting>& open = meetings[current->warp];
  for (Meeting& meeting : open) {
    // Unrolled copies of one line are one instruction to the programmer, hence lines and not addresses.
    const bool is_same_place =
        aligned == Aligned::kNo || meeting.site == site || source_line(meeting.site) == source_line(site);
    if (meeting.mask == mask && meeting.what == what && is_same_place) return meeting;
    // A lane that this one needs is held up elsewhere, until this one comes there.
    if ((meeting.mask >> current->lane & 1) != 0 && (meeting.arrived & mask) != 0) {
      fail("DIVERGENT warp: %s with mask %08x at %s meets %s with mask %08x at %s", what, mask,
           source_line(site).c_str(), meeting.what, meeting.mask, source_line(meeting.site).c_str());
    }
  }
  open.emplace_back();
  open.back().mask = mask;
  open.back().what = what;
  open.back().site = site;
  return open.back();
}

// ---- shuffles, votes, reductions ----

struct ShuffleArgument {
  uint64_t value, result;
  int source;  // negative: the lane keeps its own value
};
void exchange(LaneArguments lanes, uint32_t mask) {
  ++counters.shuffles;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto& argument = *static_cast<ShuffleArgument*>(lanes[lane]);
    if (argument.source < 0) {
      argument.result = argument.value;
    } else if (mask >> argument.source & 1) {
      argument.result = static_cast<ShuffleArgument*>(lanes[argument.source])->value;
    } else {
      argument.result = ~uint64_t{0};  // undefined on the device: a NaN, so that a use of it shows
    }
  }
}

struct VoteArgument {
  bool predicate;
  uint32_t result;
};
void collect_votes(LaneArguments lanes, uint32_t mask) {
  ++counters.votes;
  uint32_t votes = 0;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    if (static_cast<VoteArgument*>(lanes[lane])->predicate) votes |= 1u << lane;
  }
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    static_cast<VoteArgument*>(lanes[__builtin_ctz(left)])->result = votes;
  }
}

struct ReduceArgument {
  Reduction operation;
  int64_t value;
};
int64_t combine(Reduction operation, int64_t a, int64_t b) {
  switch (operation) {
    case Reduction::kAdd:
      return a + b;
    case Reduction::kMax:
      return std::max(a, b);
    case Reduction::kMin:
      return std::min(a, b);
    case Reduction::kAnd:
      return a & b;
    case Reduction::kOr:
      return a | b;
    case Reduction::kXor:
      return a ^ b;
  }
  __builtin_unreachable();
}
void reduce_lanes(LaneArguments lanes, uint32_t mask) {
  ++counters.reductions;
  const int first = __builtin_ctz(mask);
  auto& total = *static_cast<ReduceArgument*>(lanes[first]);
  for (uint32_t left = mask & (mask - 1); left != 0; left &= left - 1) {
    const auto& other = *static_cast<ReduceArgument*>(lanes[__builtin_ctz(left)]);
    total.value = combine(total.operation, total.value, other.value);
  }
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    static_cast<ReduceArgument*>(lanes[__builtin_ctz(left)])->value = total.value;
  }
}

// Shuffles, votes and matrix instructions order no memory accesses (PTX ISA); bar.warp.sync does.
void order_memory(LaneArguments, uint32_t mask) {
  ++counters.warp_syncs;
  if (!options.check_races) return;
  ClockJoin join;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    join.add(block.thread(current->warp, __builtin_ctz(left)).clock);
  }
  const Epoch epoch = next_epoch();
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    ThreadClock& clock = block.thread(current->warp, __builtin_ctz(left)).clock;
    join.publish_to(clock);
    clock.epoch = epoch;
  }
}

}  // namespace

void rendezvous(uint32_t mask, const char* what, void* argument, WarpOperation operation, Site site, Aligned aligned) {
  const Warp& warp = block.warps[current->warp];
  if ((mask >> current->lane & 1) == 0) {
    fail("%s at %s: the calling lane is not in the mask %08x", what, source_line(site).c_str(), mask);
  }
  if ((mask & ~warp.alive) != 0) {
    fail("%s at %s: the mask %08x names lanes %08x, which have exited", what, source_line(site).c_str(), mask,
         mask & ~warp.alive);
  }
  Meeting& meeting = meeting_of(mask, what, site, aligned);
  meeting.arguments[current->lane] = argument;
  meeting.arrived |= 1u << current->lane;
  if (meeting.arrived != mask) {
    wait_for({what, site, &describe, static_cast<uint32_t>(current->index)});
    return;
  }
  operation(meeting.arguments.data(), mask);
  for (uint32_t left = mask & ~(1u << current->lane); left != 0; left &= left - 1) {
    wake(block.thread(current->warp, __builtin_ctz(left)));
  }
  std::vector<Meeting>& open = meetings[current->warp];
  open.erase(open.begin() + (&meeting - open.data()));
}

void reset_rendezvous() { meetings.assign(block.warps.size(), {}); }

void check_no_rendezvous_at_exit(const Thread& thread) {
  for (const Meeting& meeting : meetings[thread.warp]) {
    if (meeting.mask >> thread.lane & 1) {
      fail("lane exits while others of its warp wait for it in %s at %s", meeting.what,
           source_line(meeting.site).c_str());
    }
  }
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int lane_operand, int width) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) fail("shuffle: width %d is no power of two", width);
  const int lane = current->lane;
  const int first = lane & ~(width - 1);  // of the lane's segment
  int source = lane;
  const char* what = "";
  switch (kind) {
    case Shuffle::kIndex:
      what = "shfl.idx";
      source = first | (lane_operand & (width - 1));
      break;
    case Shuffle::kXor:
      what = "shfl.bfly";
      source = lane ^ lane_operand;
      if (source >= first + width) source = -1;
      break;
    case Shuffle::kDown:
      what = "shfl.down";
      source = lane + lane_operand;
      if (source >= first + width) source = -1;
      break;
    case Shuffle::kUp:
      what = "shfl.up";
      source = lane - lane_operand;
      if (source < first) source = -1;
      break;
  }
  ShuffleArgument argument{value, value, source};
  rendezvous(mask, what, &argument, &exchange, __builtin_return_address(0), Aligned::kNo);
  return argument.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  VoteArgument argument{predicate, 0};
  rendezvous(mask, "vote", &argument, &collect_votes, __builtin_return_address(0), Aligned::kNo);
  return argument.result;
}

int64_t reduce(Reduction operation, uint32_t mask, int64_t value) {
  ReduceArgument argument{operation, value};
  rendezvous(mask, "redux.sync", &argument, &reduce_lanes, __builtin_return_address(0), Aligned::kNo);
  return argument.value;
}

void sync_warp(uint32_t mask) {
  rendezvous(mask, "__syncwarp", nullptr, &order_memory, __builtin_return_address(0), Aligned::kNo);
}

// The lanes that happen to run together are not defined; the least that is true is the calling lane.
uint32_t active_mask() { return 1u << current->lane; }

}  // namespace simt
