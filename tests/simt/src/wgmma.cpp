#include "wgmma.h"

#include <algorithm>
#include <array>
#include <memory>

#include "actors.h"
#include "counters.h"
#include "rendezvous.h"
#include "shadow.h"
#include "tma.h"

namespace simt {

namespace {

constexpr int kWarpsPerGroup = 4;
constexpr int kRowsPerWarp = 16;
constexpr int kK = 16;
constexpr int kMaxN = 256;
constexpr uint32_t kPoison = 0x7fedbeef;  // a NaN; what accumulators hold while in flight

// One warp's accumulators of the wgmmas in flight on them.
struct Accumulators {
  int num_registers = 0;
  int num_in_flight = 0;
  std::array<float*, kWarpSize> registers{};                     // by lane: the kernel's own array
  std::array<std::array<float, kMaxN / 2>, kWarpSize> values{};  // what they will hold
};

struct OperandTile {
  uint64_t descriptor = 0;
  bool is_mn_major = false;
};

// One warp's part of an operation.
struct Operation {
  int n;
  MatrixElement element;
  bool is_a_in_registers, accumulates;
  OperandTile a, b;
  std::array<std::array<uint32_t, 4>, kWarpSize> a_registers;
  std::shared_ptr<Accumulators> accumulators;
  int sequence;  // among the warpgroup's operations
  int group;     // committed together
  bool is_done;
  Site site;
};

// Enough of an operation to see that the four warps issue the same one.
struct Signature {
  int n;
  uint64_t a, b;
  bool operator==(const Signature& other) const { return n == other.n && a == other.a && b == other.b; }
};

struct WarpState {
  std::vector<std::unique_ptr<Operation>> in_flight;
  std::vector<std::shared_ptr<Accumulators>> accumulators;
  std::vector<Signature> issued;
  int open_group = 0;
  bool is_fenced = false;
  std::vector<Thread*> waiting_for_others;  // lanes in wait_group until the other warps have issued
};
std::vector<WarpState> states;  // by warp

int first_warp(int warp) { return warp / kWarpsPerGroup * kWarpsPerGroup; }
WarpState& my_state() { return states[current->warp]; }

// ---- operands in shared memory ----

// PTX ISA: "Matrix Descriptor Format", "Strides": the address of element (mn, k), swizzle applied.
uint32_t element_address(const OperandTile& tile, int mn, int k) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(tile.descriptor >> shift & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const int layout = static_cast<int>(tile.descriptor >> 62);
  const auto u = [](int value) { return static_cast<uint32_t>(value); };
  if (layout == 0) {  // no swizzle: core matrices of 8 rows of 16 bytes
    return tile.is_mn_major ? start + u(mn / 8) * stride + u(k / 8) * leading + u(k % 8) * 16 + u(mn % 8) * 2
                            : start + u(mn / 8) * stride + u(k / 8) * leading + u(mn % 8) * 16 + u(k % 8) * 2;
  }
  const int swizzle_bytes = 256 >> layout;  // 1: 128, 2: 64, 3: 32
  const int chunk = swizzle_bytes / 2;      // elements
  const uint32_t address = tile.is_mn_major ? start + u(mn / chunk) * leading + u(k / 8) * stride +
                                                  u(k % 8 * swizzle_bytes) + u(mn % chunk) * 2
                                            : start + u(mn / 8) * stride + u(mn % 8 * swizzle_bytes) + u(k) * 2;
  return swizzled(address, u(swizzle_bytes));
}

// Calls function(first mn, first k, address) for each 16-byte piece of rows mn_begin .. mn_begin + mn_count - 1: 8
// elements along the tile's major index.
template <typename Function>
void for_each_piece(const OperandTile& tile, int mn_begin, int mn_count, Function function) {
  const int mn_step = tile.is_mn_major ? 8 : 1, k_step = tile.is_mn_major ? 1 : 8;
  for (int k = 0; k < kK; k += k_step) {
    for (int mn = mn_begin; mn < mn_begin + mn_count; mn += mn_step) function(mn, k, element_address(tile, mn, k));
  }
}

// The warp's share of A, and all of B.
template <typename Function>
void for_each_operand_piece(const Operation& operation, int warp, Function function) {
  if (!operation.is_a_in_registers) {
    for_each_piece(operation.a, warp % kWarpsPerGroup * kRowsPerWarp, kRowsPerWarp, function);
  }
  for_each_piece(operation.b, 0, operation.n, function);
}

template <typename Store>
void read_tile(const OperandTile& tile, MatrixElement element, int mn_begin, int mn_count, Site site, Store store) {
  for_each_piece(tile, mn_begin, mn_count, [&](int mn, int k, uint32_t address) {
    uint16_t piece[8];
    std::memcpy(piece, shared_pointer(address, sizeof piece, site), sizeof piece);
    for (int i = 0; i < 8; ++i) {
      store((tile.is_mn_major ? mn + i : mn) - mn_begin, tile.is_mn_major ? k : k + i,
            element_value(element, piece[i]));
    }
  });
}

void compute(const Operation& operation, int warp) {
  static float a[kRowsPerWarp][kK], b[kK][kMaxN], c[kRowsPerWarp][kMaxN];
  if (!operation.is_a_in_registers) {
    read_tile(operation.a, operation.element, warp % kWarpsPerGroup * kRowsPerWarp, kRowsPerWarp, operation.site,
              [](int mn, int k, float value) { a[mn][k] = value; });
  }
  read_tile(operation.b, operation.element, 0, operation.n, operation.site,
            [](int mn, int k, float value) { b[k][mn] = value; });
  const auto for_each_accumulator = [&](auto function) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int group = lane / 4, quad = lane % 4;
      for (int i = 0; i < operation.n / 2; ++i) {
        function(c[group + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * quad + i % 2], operation.accumulators->values[lane][i]);
      }
    }
  };
  if (operation.is_a_in_registers) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int group = lane / 4, quad = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = operation.a_registers[lane][i];
        float* target = &a[group + 8 * (i % 2)][2 * quad + 8 * (i / 2)];
        target[0] = element_value(operation.element, static_cast<uint16_t>(pair));
        target[1] = element_value(operation.element, static_cast<uint16_t>(pair >> 16));
      }
    }
  }
  for_each_accumulator([&](float& c_element, float value) { c_element = operation.accumulates ? value : 0.0f; });
  multiply_add<kMaxN>(&a[0][0], kK, b, c, kRowsPerWarp, operation.n, kK);
  for_each_accumulator([](float c_element, float& value) { value = c_element; });
  counters.wgmma_macs += static_cast<uint64_t>(kRowsPerWarp * kK * operation.n);
}

// ---- issue ----

std::shared_ptr<Accumulators> take_accumulators(LaneArguments lanes, int num_registers, Site site) {
  for (const auto& accumulators : my_state().accumulators) {
    if (accumulators->registers[0] == static_cast<const PtxCall*>(lanes[0])->address(0)) return accumulators;
  }
  auto accumulators = std::make_shared<Accumulators>();
  accumulators->num_registers = num_registers;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& call = *static_cast<const PtxCall*>(lanes[lane]);
    auto* registers = static_cast<float*>(call.address(0));
    for (int i = 0; i < num_registers; ++i) {
      if (call.address(i) != registers + i) {
        fail("wgmma at %s: the accumulators are not one array in order", source_line(site).c_str());
      }
      accumulators->values[lane][i] = registers[i];
      std::memcpy(&registers[i], &kPoison, sizeof kPoison);
    }
    accumulators->registers[lane] = registers;
  }
  my_state().accumulators.push_back(accumulators);
  return accumulators;
}

// Operands: acc (n / 2), A (descriptor, or 4 registers), B's descriptor, accumulate, 1, 1, [A's major,] B's major.
void issue(LaneArguments lanes, uint32_t) {
  const auto& call = *static_cast<const PtxCall*>(lanes[0]);
  const int warp = current->warp;
  WarpState& state = my_state();
  if (!state.is_fenced) {
    fail("MISSING wgmma.fence before the wgmma at %s: none since the start or the last wgmma.wait_group",
         source_line(call.site).c_str());
  }
  if (warp % kWarpsPerGroup == 0) ++counters.wgmma;
  const int n = call.parameter() & 0xfff;
  auto operation = std::make_unique<Operation>();
  operation->n = n;
  operation->element = static_cast<MatrixElement>(call.parameter() >> 12 & 0xf);
  operation->is_a_in_registers = call.parameter() >> 16 != 0;
  operation->site = call.site;
  operation->is_done = false;
  operation->group = state.open_group;
  operation->sequence = static_cast<int>(state.issued.size());

  const int a = n / 2, b = a + (operation->is_a_in_registers ? 4 : 1);
  const int accumulate = b + 1, scale_a = b + 2, scale_b = b + 3, majors = b + 4;
  if (call.u32(scale_a) != 1 || call.u32(scale_b) != 1) {
    fail("wgmma at %s: negated operands are not emulated", source_line(call.site).c_str());
  }
  operation->accumulates = call.u32(accumulate) != 0;
  operation->b = {call.u64(b), call.u32(majors + (operation->is_a_in_registers ? 0 : 1)) != 0};
  if (!operation->is_a_in_registers) operation->a = {call.u64(a), call.u32(majors) != 0};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& other = *static_cast<const PtxCall*>(lanes[lane]);
    const bool is_same = other.u64(b) == call.u64(b) && other.u32(accumulate) == call.u32(accumulate) &&
                         (operation->is_a_in_registers || other.u64(a) == call.u64(a));
    if (!is_same) fail("DIVERGENT wgmma at %s: the lanes' descriptors differ", source_line(call.site).c_str());
    for (int i = 0; i < 4 && operation->is_a_in_registers; ++i) operation->a_registers[lane][i] = other.u32(a + i);
  }

  const Signature signature{n, operation->a.descriptor, operation->b.descriptor};
  state.issued.push_back(signature);
  const auto sequence = static_cast<size_t>(operation->sequence);
  for (int other = first_warp(warp); other < first_warp(warp) + kWarpsPerGroup; ++other) {
    if (other >= block.num_warps()) fail("wgmma at %s: an incomplete warpgroup", source_line(call.site).c_str());
    if (states[other].issued.size() > sequence && !(states[other].issued[sequence] == signature)) {
      fail("DIVERGENT wgmma at %s: warps %d and %d of a warpgroup issue different operations",
           source_line(call.site).c_str(), warp, other);
    }
  }

  for_each_operand_piece(*operation, warp, [&](int, int, uint32_t address) {
    shared_pointer(address, 16, call.site);
    begin_async_read(*current, address, 16, call.site);
  });
  operation->accumulators = take_accumulators(lanes, n / 2, call.site);
  ++operation->accumulators->num_in_flight;
  state.in_flight.push_back(std::move(operation));
  for (int other = first_warp(warp); other < first_warp(warp) + kWarpsPerGroup; ++other) {
    for (Thread* thread : states[other].waiting_for_others) wake(*thread);
    states[other].waiting_for_others.clear();
  }
}

// ---- completion ----

void complete_for_warpgroup(int sequence) {
  const int first = first_warp(current->warp);
  for (int warp = first; warp < first + kWarpsPerGroup; ++warp) {
    for (const auto& operation : states[warp].in_flight) {
      if (operation->sequence != sequence || operation->is_done) continue;
      operation->is_done = true;
      compute(*operation, warp);
      --operation->accumulators->num_in_flight;
      for_each_operand_piece(*operation, warp, [&](int, int, uint32_t address) {
        end_async_read(address, 16, wgmma_actor(warp / kWarpsPerGroup), static_cast<Epoch>(sequence + 1),
                       operation->site);
      });
    }
  }
}

void give_back(const Accumulators& accumulators, Site site) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < accumulators.num_registers; ++i) {
      float* target = accumulators.registers[lane] + i;
      if (std::memcmp(target, &kPoison, sizeof kPoison) != 0) {
        fail("RACE: accumulator register %d of lane %d was written while a wgmma was in flight, before the wait at %s",
             i, lane, source_line(site).c_str());
      }
      *target = accumulators.values[lane][i];
    }
  }
}

// The first operation that a wait for `pending` groups leaves in flight.
int first_left_in_flight(const WarpState& state, int pending) {
  int sequence = 0;
  for (const auto& operation : state.in_flight) {
    if (operation->group < state.open_group - pending) sequence = operation->sequence + 1;
  }
  return sequence;
}

void wait_group(LaneArguments lanes, uint32_t) {
  const auto& call = *static_cast<const PtxCall*>(lanes[0]);
  WarpState& state = my_state();
  state.is_fenced = false;
  const int end = first_left_in_flight(state, call.s32(0));
  for (const auto& operation : state.in_flight) {
    if (operation->sequence < end) complete_for_warpgroup(operation->sequence);
  }
  state.in_flight.erase(state.in_flight.begin(),
                        std::find_if(state.in_flight.begin(), state.in_flight.end(),
                                     [&](const auto& operation) { return operation->sequence >= end; }));
  const auto is_idle = [](const auto& accumulators) { return accumulators->num_in_flight == 0; };
  for (const auto& accumulators : state.accumulators) {
    if (is_idle(accumulators)) give_back(*accumulators, call.site);
  }
  state.accumulators.erase(std::remove_if(state.accumulators.begin(), state.accumulators.end(), is_idle),
                           state.accumulators.end());
  if (!options.check_races || end == 0) return;
  // Whoever waited knows that the operands were read.
  for (int lane = 0; lane < kWarpSize; ++lane) {
    ThreadClock& clock = block.thread(current->warp, lane).clock;
    ClockJoin join;
    join.set(wgmma_actor(current->warp / kWarpsPerGroup), static_cast<Epoch>(end));
    join.merge_into(clock);
  }
}

void meet(const PtxCall& call, WarpOperation operation) {
  rendezvous(kFullWarp, call.instruction->opcode, const_cast<PtxCall*>(&call), operation, call.site, Aligned::kYes);
}

}  // namespace

void execute_wgmma(const PtxCall& call) { meet(call, &issue); }

void execute_wgmma_fence(const PtxCall& call) {
  meet(call, [](LaneArguments, uint32_t) { my_state().is_fenced = true; });
}

void execute_wgmma_commit(const PtxCall& call) {
  meet(call, [](LaneArguments, uint32_t) { ++my_state().open_group; });
}

void execute_wgmma_wait(const PtxCall& call) {
  const auto needed = static_cast<size_t>(first_left_in_flight(my_state(), call.s32(0)));
  const int first = first_warp(current->warp);
  const auto has_issued = [&](const WarpState& state) { return state.issued.size() >= needed; };
  while (needed > 0 && !std::all_of(states.begin() + first, states.begin() + first + kWarpsPerGroup, has_issued)) {
    my_state().waiting_for_others.push_back(current);
    wait_for({"wgmma.wait_group, for the other warps of the warpgroup to issue", call.site});
  }
  meet(call, &wait_group);
}

void reset_wgmma() {
  states.clear();
  states.resize(block.warps.size());
}

void check_no_wgmma_at_exit(const Thread& thread) {
  const auto& in_flight = states[thread.warp].in_flight;
  if (in_flight.empty()) return;
  fail("EXIT with a wgmma in flight, issued at %s", source_line(in_flight[0]->site).c_str());
}

void check_accumulators(const void* address, bool is_write, Site site) {
  for (const auto& accumulators : my_state().accumulators) {
    const auto offset = static_cast<size_t>(static_cast<const char*>(address) -
                                            reinterpret_cast<const char*>(accumulators->registers[current->lane]));
    if (offset >= static_cast<size_t>(accumulators->num_registers) * sizeof(float)) continue;
    fail("RACE: accumulator register %zu is %s while a wgmma is in flight, at %s", offset / sizeof(float),
         is_write ? "written" : "read", source_line(site).c_str());
  }
}

}  // namespace simt
