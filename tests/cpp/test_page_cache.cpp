// page_cache.h: blocks come back warm, never to two at a time, and what is kept is bounded.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/page_cache.h"

namespace adasplash2::test {
namespace {

using namespace cpu;

constexpr size_t kMiB = size_t{1} << 20;

char* take(size_t bytes) { return static_cast<char*>(take_pages(bytes).data); }

void comes_back() {
  char* first = take(5 * kMiB);
  check(reinterpret_cast<uintptr_t>(first) % kHugePage == 0, "not aligned");
  std::memset(first, 1, 5 * kMiB);
  give_pages(first, 5 * kMiB, 5 * kMiB);
  check(kept_bytes() == 6 * kMiB, "kept ", kept_bytes());
  void* other = take(9 * kMiB);
  check(other != first, "a block of another size");
  void* again = take(5 * kMiB + 1);  // as many pages
  check(again == first, "a new block though one is there");
  check(kept_bytes() == 0, "kept ", kept_bytes());
  void* second = take(5 * kMiB);
  check(second != again, "a block that is in use");
  for (void* block : {again, second}) give_pages(block, 5 * kMiB, 0);
  give_pages(other, 9 * kMiB, 0);
  check(kept_bytes() == 0, "blocks that nobody touched are kept: ", kept_bytes());
}

// Between 32 MiB and 64 MiB blocks come in steps of 4 MiB: a few entries more or less find the same block.
void sizes_are_coarse() {
  char* block = take(37 * kMiB);
  block[37 * kMiB - 1] = 1;
  give_pages(block, 37 * kMiB, 37 * kMiB);
  char* larger = take(40 * kMiB);
  check(larger == block, "40 MiB are not where 37 MiB were");
  larger[40 * kMiB - 1] = 1;
  give_pages(larger, 40 * kMiB, 0);
}

// Pages behind what was used are not kept: they are zero again.
void returns_what_was_not_used() {
  constexpr size_t kBytes = 16 * kMiB;
  char* block = take(kBytes);
  std::memset(block, 1, kBytes);
  give_pages(block, kBytes, 3 * kMiB);
  check(kept_bytes() == 4 * kMiB, "kept ", kept_bytes());
  const Pages again = take_pages(kBytes);
  check(again.data == block && again.used == 4 * kMiB, again.used, " bytes used, 4 MiB were");
  for (size_t i = again.used; i < kBytes; ++i) {
    if (block[i] != 0) return check(false, "byte ", i, " is still there");
  }
  give_pages(block, kBytes, 0);
  const Pages fresh = take_pages(kBytes);
  check(fresh.used == 0, fresh.used, " bytes used of a new block");
  give_pages(fresh.data, kBytes, 0);
}

void keeps_a_bounded_amount() {
  constexpr size_t kBytes = 64 * kMiB;
  std::vector<void*> blocks;
  for (int i = 0; i < 8; ++i) blocks.push_back(take(kBytes));
  for (void* block : blocks) {
    give_pages(block, kBytes, kBytes);
    check(kept_bytes() <= kMostKeptBytes, "kept ", kept_bytes());
  }
  check(kept_bytes() == kMostKeptBytes, "kept ", kept_bytes());
  void* last = take(kBytes);
  check(last == blocks.back(), "not the last one that was given back");
  void* large = take(2 * kMostKeptBytes);
  give_pages(large, 2 * kMostKeptBytes, 2 * kMostKeptBytes);
  check(kept_bytes() == kMostKeptBytes - kBytes, "a block above the bound: kept ", kept_bytes());
  give_pages(last, kBytes, 0);
}

void serves_threads() {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 200; ++i) {
        constexpr size_t kBytes = 4 * kMiB;
        char* block = take(kBytes);
        std::memset(block, t, 4096);
        std::this_thread::yield();
        bool is_own = true;
        for (int j = 0; j < 4096; ++j) is_own &= block[j] == t;
        if (!is_own) check(false, "thread ", t, ": somebody else's block");
        give_pages(block, kBytes, 4096);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A child process has a cache of its own, whatever threads did when it began.
void survives_fork() {
  bool is_done = false;
  std::thread busy([&] {
    while (!__atomic_load_n(&is_done, __ATOMIC_RELAXED)) give_pages(take(2 * kMiB), 2 * kMiB, 1);
  });
  for (int i = 0; i < 50; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);  // rather than wait for ever
      give_pages(take(2 * kMiB), 2 * kMiB, 1);
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    check(status == 0, "the child ended with ", status);
  }
  __atomic_store_n(&is_done, true, __ATOMIC_RELAXED);
  busy.join();
}

}  // namespace
}  // namespace adasplash2::test

int main() {
  using namespace adasplash2::test;
  comes_back();
  sizes_are_coarse();
  returns_what_was_not_used();
  keeps_a_bounded_amount();
  serves_threads();
  survives_fork();
  return result();
}
