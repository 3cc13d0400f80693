#include "scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <map>

#include "actors.h"
#include "barrier.h"
#include "cp_async.h"
#include "fiber.h"
#include "mbarrier.h"
#include "rendezvous.h"
#include "shadow.h"
#include "tma.h"
#include "wgmma.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Options options;
Block block;
Thread* current = nullptr;
StackPool stacks;

namespace {

constexpr int kMaxIdlePolls = 1000;

void* main_stack = nullptr;
const KernelCall* kernel_call = nullptr;
int current_warp = 0;
std::vector<Thread*> pollers;  // threads in poll_for
int idle_polls = 0;            // rounds of polling since a thread last got on

std::string ranges(const std::vector<int>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t last = i;
    while (last + 1 < sorted.size() && sorted[last + 1] == sorted[last] + 1) ++last;
    if (!text.empty()) text += ",";
    text += std::to_string(sorted[i]);
    if (last > i) text += "-" + std::to_string(sorted[last]);
    i = last + 1;
  }
  return text;
}

[[noreturn]] void report_deadlock() {
  current = nullptr;
  std::map<std::string, std::vector<int>> threads_by_wait;
  for (const Thread& thread : block.threads) {
    if (!thread.is_alive) continue;
    std::string wait = std::string(thread.wait.what) + " at " + source_line(thread.wait.site);
    if (thread.wait.describe != nullptr) wait += " [" + thread.wait.describe(thread.wait) + "]";
    threads_by_wait[wait].push_back(thread.index);
  }
  std::string text = "DEADLOCK: every live thread waits";
  for (const auto& [wait, threads] : threads_by_wait) {
    text += "\n  " + std::to_string(threads.size()) + " threads {" + ranges(threads) + "} in " + wait;
  }
  fail("%s", text.c_str());
}

int choose_warp() {
  int best = -1;
  for (int i = 0; i < block.num_warps(); ++i) {
    if (block.warps[i].runnable == 0) continue;
    if (options.seed == 0) return i;
    if (options.seed == 1 || best < 0 || block.warps[i].priority > block.warps[best].priority) best = i;
  }
  return best;
}

int choose_lane(uint32_t runnable) {
  if (options.seed == 0) return __builtin_ctz(runnable);
  if (options.seed == 1) return 31 - __builtin_clz(runnable);
  const int turn = static_cast<int>(block.random() % kWarpSize);
  const uint32_t rotated = turn == 0 ? runnable : runnable >> turn | runnable << (kWarpSize - turn);
  return (__builtin_ctz(rotated) + turn) % kWarpSize;
}

// Nothing can run: let time pass for what runs beside the threads.
void advance_asynchronous_work() {
  if (complete_one_tma_load()) {
    idle_polls = 0;
    return;
  }
  if (pollers.empty() || ++idle_polls > kMaxIdlePolls) report_deadlock();
  for (Thread* thread : pollers) block.warps[thread->warp].runnable |= 1u << thread->lane;
  pollers.clear();
}

Thread& choose_thread() {
  if (options.seed >= 2 && block.random() % 16 == 0 && block.flip_early()) complete_one_tma_load();
  bool stay = block.warps[current_warp].runnable != 0;
  if (options.seed >= 2 && block.random() % 24 == 0) {
    block.warps[current_warp].priority = block.random();
    stay = false;
  }
  while (!stay) {
    const int warp = choose_warp();
    if (warp >= 0) {
      current_warp = warp;
      stay = true;
    } else {
      advance_asynchronous_work();
    }
  }
  return block.thread(current_warp, choose_lane(block.warps[current_warp].runnable));
}

// Enters the next thread; returns when `leaving` is chosen again (never, if it is not runnable).
void switch_from(Thread& leaving) {
  Thread& next = choose_thread();
  if (&next == &leaving) return;
  current = &next;
  threadIdx = next.id;
  simt_switch_stack(&leaving.stack_pointer, next.stack_pointer);
}

void thread_main() {
  kernel_call->run_thread(kernel_call->arguments);
  Thread& thread = *current;
  check_no_copies_at_exit(thread);
  check_no_stores_at_exit(thread);
  check_no_wgmma_at_exit(thread);
  thread.is_alive = false;
  Warp& warp = block.warps[thread.warp];
  warp.alive &= ~(1u << thread.lane);
  warp.runnable &= ~(1u << thread.lane);
  check_no_rendezvous_at_exit(thread);
  if (--block.num_alive == 0) {
    check_no_loads_at_exit();
    simt_switch_stack(&thread.stack_pointer, main_stack);
  }
  release_barrier_at_exit();
  switch_from(thread);
  __builtin_unreachable();
}

}  // namespace

uint64_t seed_from_environment() {
  const char* seed = std::getenv("SIMT_SEED");
  return seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10);
}

uint64_t Block::random() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state >> 11;
}

bool Block::flip_early() { return options.seed >= 2 && random() % 100 < 30; }

void wait_for(const Wait& wait) {
  Thread& thread = *current;
  thread.wait = wait;
  block.warps[thread.warp].runnable &= ~(1u << thread.lane);
  switch_from(thread);
}

void wake(Thread& thread) {
  idle_polls = 0;
  block.warps[thread.warp].runnable |= 1u << thread.lane;
}

void poll_for(const Wait& wait) {
  Thread* const thread = current;
  pollers.push_back(thread);
  wait_for(wait);
  pollers.erase(std::remove(pollers.begin(), pollers.end(), thread), pollers.end());
}

void abandon_block(std::string failure) {
  block.failure = std::move(failure);
  void* abandoned;
  simt_switch_stack(&abandoned, main_stack);
  __builtin_unreachable();
}

void run_block(dim3 block_size, uint64_t salt, const KernelCall& call) {
  const int num_threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  const int num_warps = num_threads / kWarpSize;
  stacks.reserve(num_threads);
  kernel_call = &call;
  current_warp = 0;
  idle_polls = 0;
  pollers.clear();
  block.failure.clear();
  block.random_state = (options.seed + 1) * 0x9E3779B97F4A7C15ull ^ (salt + 1) * 0xD1B54A32D192ED03ull;
  block.num_alive = num_threads;
  block.warps.assign(static_cast<size_t>(num_warps), Warp());
  for (Warp& warp : block.warps) {
    warp.alive = warp.runnable = kFullWarp;
    warp.priority = block.random();
  }
  block.threads.assign(static_cast<size_t>(num_threads), Thread());
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = block.threads[i];
    const unsigned index = static_cast<unsigned>(i);
    thread.index = thread.clock.actor = i;
    thread.warp = i / kWarpSize;
    thread.lane = i % kWarpSize;
    thread.id = {index % block_size.x, index / block_size.x % block_size.y, index / block_size.x / block_size.y};
    thread.is_alive = true;
    thread.stack_pointer = stacks.prepare(i, &thread_main);
  }
  reset_epochs(num_actors());
  reset_rendezvous();
  reset_barriers();
  reset_cp_async();
  reset_mbarriers();
  reset_tma();
  reset_wgmma();

  block.is_running = true;
  Thread& first = choose_thread();
  current = &first;
  threadIdx = first.id;
  simt_switch_stack(&main_stack, first.stack_pointer);
  block.is_running = false;
  current = nullptr;
}

}  // namespace simt
