// The block that runs: its threads, its warps, and who goes next.
//
// A thread runs until it has to wait; the next one is entered directly. The schedule stays in a warp as long as one of
// its lanes can run, because "one warp as far ahead as possible" is what brings missing barriers to light. Seed 0 goes
// by ascending warp and lane, seed 1 by descending, any other by random warp priorities with rare changes.
#pragma once

#include <simt_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "clock.h"
#include "report.h"

namespace simt {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

// SIMT_SEED, for programs with a main() of their own; 0 without it.
uint64_t seed_from_environment();

struct Options {
  uint64_t seed = seed_from_environment();
  bool check_races = true;  // shadow memory and clocks; needs an instrumented build to see ordinary accesses
};
extern Options options;

// What a thread waits for; `describe` adds the state of the object for the deadlock report.
struct Wait {
  const char* what = "start";
  Site site = nullptr;
  std::string (*describe)(const Wait&) = nullptr;
  uint32_t object = 0;
  uint32_t parity = 0;
};

struct Thread {
  int index = 0, warp = 0, lane = 0;
  uint3 id{};
  bool is_alive = false;
  void* stack_pointer = nullptr;
  Wait wait;
  ThreadClock clock;
};

struct Warp {
  uint32_t alive = 0, runnable = 0;  // masks of lanes
  uint64_t priority = 0;
};

struct Block {
  bool is_running = false;
  int num_alive = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::string failure;

  // The block's own generator: the same seed gives the same schedule.
  uint64_t random_state = 1;
  uint64_t random();
  // Seeds 0 and 1 delay asynchronous work as far as it goes; others do some of it early.
  bool flip_early();

  int num_warps() const { return static_cast<int>(warps.size()); }
  Thread& thread(int warp, int lane) { return threads[static_cast<size_t>(warp * kWarpSize + lane)]; }
};
extern Block block;
extern Thread* current;

void run_block(dim3 block_size, uint64_t salt, const KernelCall& call);

// Suspends the current thread until wake() names it.
void wait_for(const Wait& wait);
void wake(Thread& thread);
// Suspends the current thread until wake(), or until nothing else can run; repeated without any progress: a deadlock.
void poll_for(const Wait& wait);

[[noreturn]] void abandon_block(std::string failure);

}  // namespace simt
