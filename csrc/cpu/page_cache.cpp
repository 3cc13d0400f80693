#include "cpu/page_cache.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <mutex>
#include <new>
#include <vector>

namespace adasplash2::cpu {
namespace {

struct Block {
  char* data;
  size_t bytes, used;
};

struct PageCache {
  std::mutex mutex;
  std::vector<Block> blocks;  // the oldest first
  size_t used = 0;            // by all of them
};

PageCache& cache() {
  static PageCache& cache = *[] {
    // Not locked in a child process by a thread that the child does not have.
    pthread_atfork([] { adasplash2::cpu::cache().mutex.lock(); }, [] { adasplash2::cpu::cache().mutex.unlock(); },
                   [] { adasplash2::cpu::cache().mutex.unlock(); });
    return new PageCache;  // never destroyed: tensors may be freed after static objects
  }();
  return cache;
}

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

char* map(size_t bytes) {
  const size_t padded = bytes + kHugePage;
  void* mapped = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char *begin = static_cast<char*>(mapped), *aligned = begin + (-reinterpret_cast<size_t>(begin) & (kHugePage - 1));
  if (aligned > begin) munmap(begin, aligned - begin);
  munmap(aligned + bytes, begin + padded - (aligned + bytes));
  madvise(aligned, bytes, MADV_HUGEPAGE);
  return aligned;
}

}  // namespace

size_t mapped_bytes(size_t bytes) {
  size_t unit = kHugePage;
  while (unit * 16 < bytes) unit *= 2;
  return round_up(bytes, unit);
}

Pages take_pages(size_t bytes) {
  bytes = mapped_bytes(bytes);
  PageCache& kept = cache();
  {
    const std::lock_guard lock(kept.mutex);
    for (auto block = kept.blocks.rbegin(); block != kept.blocks.rend(); ++block) {  // the last one is the warmest
      if (block->bytes != bytes) continue;
      const Pages found{block->data, block->used};
      kept.used -= block->used;
      kept.blocks.erase(std::next(block).base());
      return found;
    }
  }
  return {map(bytes), 0};
}

void give_pages(void* data, size_t bytes, size_t used) noexcept {
  bytes = mapped_bytes(bytes);
  used = round_up(used, kHugePage);
  char* begin = static_cast<char*>(data);
  if (used == 0 || used > kMostKeptBytes) {
    munmap(begin, bytes);
    return;
  }
  if (used < bytes) madvise(begin + used, bytes - used, MADV_DONTNEED);
  madvise(begin, used, MADV_FREE);
  PageCache& kept = cache();
  const std::lock_guard lock(kept.mutex);
  auto oldest = kept.blocks.begin();
  for (; kept.used + used > kMostKeptBytes; ++oldest) {
    munmap(oldest->data, oldest->bytes);
    kept.used -= oldest->used;
  }
  kept.blocks.erase(kept.blocks.begin(), oldest);
  try {
    kept.blocks.push_back({begin, bytes, used});
    kept.used += used;
  } catch (const std::bad_alloc&) {
    munmap(begin, bytes);
  }
}

size_t kept_bytes() {
  const std::lock_guard lock(cache().mutex);
  return cache().used;
}

}  // namespace adasplash2::cpu
