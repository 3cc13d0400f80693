#include "shadow.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>

#include "actors.h"
#include "counters.h"
#include "fiber.h"
#include "wgmma.h"

namespace simt {

extern StackPool stacks;

namespace {

constexpr int16_t kNobody = -1;

// Lanes of one warp that accessed a cell in the same epoch: after a barrier all lanes share an epoch, so a cell that a
// whole block reads holds one entry a warp. Stand-ins for the async proxy count as lanes of warps past the last one.
struct Readers {
  Site site = nullptr;
  uint32_t lanes = 0;
  Epoch epoch = 0;
  int16_t warp = 0;
  bool is_atomic = false;
};

// The history of 4 bytes, or of one byte of a word that was ever accessed in part. One cache line: a block's shared
// memory has tens of thousands of these, all of them new with the block.
struct alignas(64) Cell {
  Site write_site = nullptr;
  Site async_read_site = nullptr;  // of the latest in flight
  Readers readers;                 // since the last write
  Epoch write_epoch = 0;
  uint32_t more_readers = 0;  // index + 1 into overflow, 0 = none
  uint32_t bytes = 0;         // index + 1 into split_words, 0 = not split
  int16_t writer = kNobody;
  int16_t async_reader = kNobody;  // who issued the latest in flight
  uint16_t async_reads = 0;        // in flight
  Proxy write_proxy = Proxy::kGeneric;
  bool is_write_in_flight = false;
  bool has_atomics = false;  // among the readers
};
static_assert(sizeof(Cell) == 64);

std::vector<Cell> words;
std::vector<std::array<Cell, 4>> split_words;
std::vector<std::vector<Readers>> overflow;  // readers beyond the first entry, of any cell

uint8_t* shared_base = nullptr;
size_t shared_bytes = 0;

template <typename Function>
void for_each_cell(uint32_t address, uint32_t bytes, Function function) {
  const uint32_t end = address + bytes;
  while (address < end) {
    Cell& word = words[(address - kSharedWindow) / 4];
    if (word.bytes == 0 && address % 4 == 0 && end - address >= 4) {
      function(word, address);
      address += 4;
      continue;
    }
    if (word.bytes == 0) {
      // From here on the word is four cells, all with the history so far.
      std::array<Cell, 4> split;
      split.fill(word);
      for (int i = 1; i < 4 && word.more_readers != 0; ++i) {
        overflow.push_back(std::vector<Readers>(overflow[word.more_readers - 1]));
        split[i].more_readers = static_cast<uint32_t>(overflow.size());
      }
      split_words.push_back(split);
      word.bytes = static_cast<uint32_t>(split_words.size());
    }
    function(split_words[word.bytes - 1][(address - kSharedWindow) % 4], address);
    ++address;
  }
}

[[noreturn]] void report(const char* kind, const char* verb, uint32_t address, Site site, const char* other_verb,
                         int other, Site other_site) {
  fail("%s at shared offset %u: %s at %s, %s at %s by %s", kind, address - kSharedWindow, verb,
       source_line(site).c_str(), other_verb, source_line(other_site).c_str(), actor_name(other).c_str());
}

// The first reader that the thread is not ordered after; kNobody if there is none.
int unordered_reader(const ThreadClock& clock, const Readers& readers) {
  for (uint32_t lanes = readers.lanes; lanes != 0; lanes &= lanes - 1) {
    const int actor = readers.warp * kWarpSize + __builtin_ctz(lanes);
    if (!clock.knows(actor, readers.epoch)) return actor;
  }
  return kNobody;
}

template <typename Function>
void for_each_readers(const Cell& cell, Function function) {
  if (cell.readers.lanes != 0) function(cell.readers);
  if (cell.more_readers == 0) return;
  for (const Readers& readers : overflow[cell.more_readers - 1]) function(readers);
}

void add_reader(Cell& cell, const Readers& reader, const ThreadClock* clock) {
  const auto joins = [&](Readers& entry) {
    if (entry.warp != reader.warp || entry.is_atomic != reader.is_atomic) return false;
    if (entry.epoch == reader.epoch) {
      entry.lanes |= reader.lanes;
      return true;
    }
    if (entry.lanes == reader.lanes) entry = reader;  // the same actor, later
    return entry.lanes == reader.lanes;
  };
  // Whoever is ordered after the new reader is ordered after those that the new reader is ordered after.
  const auto supersedes = [&](const Readers& entry) {
    return clock != nullptr && entry.is_atomic == reader.is_atomic && unordered_reader(*clock, entry) == kNobody;
  };
  cell.has_atomics |= reader.is_atomic;
  if (cell.readers.lanes == 0) {
    cell.readers = reader;
    return;
  }
  if (joins(cell.readers)) return;
  if (cell.more_readers == 0 && supersedes(cell.readers)) {
    cell.readers = reader;
    return;
  }
  if (cell.more_readers == 0) {
    overflow.emplace_back();
    cell.more_readers = static_cast<uint32_t>(overflow.size());
  }
  std::vector<Readers>& more = overflow[cell.more_readers - 1];
  for (Readers& entry : more) {
    if (joins(entry)) return;
  }
  more.erase(std::remove_if(more.begin(), more.end(), supersedes), more.end());
  more.push_back(reader);
}

Readers reader_entry(int actor, Epoch epoch, Site site, bool is_atomic) {
  return {site, 1u << actor % kWarpSize, epoch, static_cast<int16_t>(actor / kWarpSize), is_atomic};
}

void check_ordered_after_write(const Thread& thread, const Cell& cell, uint32_t address, Site site, const char* verb) {
  if (cell.is_write_in_flight) {
    report("RACE with a copy in flight", verb, address, site, "copy issued", cell.writer, cell.write_site);
  }
  if (cell.writer != kNobody && !thread.clock.knows(cell.writer, cell.write_epoch)) {
    report("RACE", verb, address, site, "unordered write", cell.writer, cell.write_site);
  }
}

void check_is_written(const Cell& cell, uint32_t address, Site site) {
  if (cell.writer == kNobody) {
    fail("UNINITIALISED shared memory at offset %u, read at %s", address - kSharedWindow, source_line(site).c_str());
  }
}

void check_fenced(const Thread& thread, const Cell& cell, uint32_t address, Site site, const char* verb) {
  if (cell.writer != kNobody && cell.write_proxy == Proxy::kGeneric &&
      !thread.clock.async_proxy_knows(cell.writer, cell.write_epoch)) {
    report("MISSING fence.proxy.async", verb, address, site, "ordinary write", cell.writer, cell.write_site);
  }
}

void check_ordered_after_readers(const Thread& thread, const Cell& cell, uint32_t address, Site site, bool is_atomic) {
  if (cell.async_reads > 0) {
    report("RACE with an asynchronous read in flight", "write", address, site, "read issued", cell.async_reader,
           cell.async_read_site);
  }
  for_each_readers(cell, [&](const Readers& readers) {
    if (is_atomic && readers.is_atomic) return;
    const int reader = unordered_reader(thread.clock, readers);
    if (reader == kNobody) return;
    report("RACE", is_atomic ? "atomic" : "write", address, site,
           readers.is_atomic ? "unordered atomic" : "unordered read", reader, readers.site);
  });
}

void set_writer(Cell& cell, int actor, Epoch epoch, Site site, Proxy proxy) {
  cell.writer = static_cast<int16_t>(actor);
  cell.write_epoch = epoch;
  cell.write_site = site;
  cell.write_proxy = proxy;
  cell.has_atomics = false;
  cell.readers = Readers();
  if (cell.more_readers != 0) overflow[cell.more_readers - 1].clear();
}

// ---- global memory ----

struct Range {
  const uint8_t* begin;
  size_t bytes;
  std::string name;
  bool contains(const uint8_t* address, size_t count) const {
    const size_t offset = static_cast<size_t>(address - begin);
    return offset < bytes && count <= bytes - offset;
  }
};
std::vector<Range> global_ranges;
size_t last_range = 0;  // the one that the latest access fell into
Range argument_range{};

// The loaded image of the kernels: its constants, and threadIdx and the like.
const Range& image_range() {
  static const Range range = [] {
    Dl_info info{};
    link_map* map = nullptr;
    dladdr1(reinterpret_cast<void*>(&image_range), &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP);
    Range found{static_cast<const uint8_t*>(info.dli_fbase), 0, "image"};
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* data) {
          auto& image = *static_cast<Range*>(data);
          size_t end = 0;
          bool is_ours = false;
          for (int i = 0; i < object->dlpi_phnum; ++i) {
            const auto& segment = object->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD) continue;
            const auto* begin = reinterpret_cast<const uint8_t*>(object->dlpi_addr + segment.p_vaddr);
            is_ours |= begin <= image.begin && image.begin < begin + segment.p_memsz;
            end = std::max(end, static_cast<size_t>(segment.p_vaddr + segment.p_memsz));
          }
          if (is_ours) image.bytes = reinterpret_cast<const uint8_t*>(object->dlpi_addr + end) - image.begin;
          return is_ours ? 1 : 0;
        },
        &found);
    return found;
  }();
  return range;
}

}  // namespace

void reset_shared(size_t bytes) {
  if (shared_base == nullptr) {
    void* mapping =
        mmap(nullptr, kMaxSharedBytes + 2 * 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    // 64 KB of slack on both sides: overruns land where they are recognised.
    shared_base = static_cast<uint8_t*>(mapping) + 65536;
  }
  shared_bytes = bytes;
  std::memset(shared_base, 0xff, bytes);  // NaN in every format
  if (!options.check_races) return;
  words.assign((bytes + 3) / 4, Cell());
  split_words.clear();
  overflow.clear();
}

bool is_shared(const void* pointer) {
  return static_cast<size_t>(static_cast<const uint8_t*>(pointer) - shared_base) < shared_bytes;
}

uint8_t* shared_memory() { return shared_base; }

uint32_t to_shared_address(const void* pointer) {
  // One past the end is an address too: of an empty last array.
  const auto offset = static_cast<size_t>(static_cast<const uint8_t*>(pointer) - shared_base);
  if (offset > shared_bytes) {
    fail("cvta.to.shared at %s: not an address of the block's %zu bytes of shared memory",
         source_line(__builtin_return_address(0)).c_str(), shared_bytes);
  }
  return kSharedWindow + static_cast<uint32_t>(offset);
}

uint8_t* shared_pointer(uint32_t address, uint32_t bytes, Site site) {
  const uint32_t offset = address - kSharedWindow;
  if (offset >= shared_bytes || bytes > shared_bytes - offset) {
    fail("OUT OF BOUNDS: %u bytes at shared offset %d of %zu, at %s", bytes, static_cast<int>(offset), shared_bytes,
         source_line(site).c_str());
  }
  return shared_base + offset;
}

void record_read(const Thread& thread, uint32_t address, uint32_t bytes, Site site) {
  if (!options.check_races) return;
  const Readers entry = reader_entry(thread.index, thread.clock.epoch, site, false);
  for_each_cell(address, bytes, [&](Cell& cell, uint32_t at) {
    check_ordered_after_write(thread, cell, at, site, "read");
    check_is_written(cell, at, site);
    if (cell.has_atomics) {
      for_each_readers(cell, [&](const Readers& readers) {
        if (!readers.is_atomic) return;
        const int other = unordered_reader(thread.clock, readers);
        if (other != kNobody) report("RACE", "read", at, site, "unordered atomic", other, readers.site);
      });
    }
    add_reader(cell, entry, &thread.clock);
  });
}

void record_write(const Thread& thread, uint32_t address, uint32_t bytes, Site site) {
  if (!options.check_races) return;
  for_each_cell(address, bytes, [&](Cell& cell, uint32_t at) {
    check_ordered_after_write(thread, cell, at, site, "write");
    check_ordered_after_readers(thread, cell, at, site, false);
    set_writer(cell, thread.index, thread.clock.epoch, site, Proxy::kGeneric);
  });
}

void record_atomic(const Thread& thread, uint32_t address, uint32_t bytes, Site site) {
  if (!options.check_races) return;
  const Readers entry = reader_entry(thread.index, thread.clock.epoch, site, true);
  for_each_cell(address, bytes, [&](Cell& cell, uint32_t at) {
    check_ordered_after_write(thread, cell, at, site, "atomic");
    check_is_written(cell, at, site);
    check_ordered_after_readers(thread, cell, at, site, true);
    add_reader(cell, entry, &thread.clock);
  });
}

void begin_async_write(const Thread& issuer, uint32_t address, uint32_t bytes, Site site, Proxy proxy) {
  if (!options.check_races) return;
  for_each_cell(address, bytes, [&](Cell& cell, uint32_t at) {
    check_ordered_after_write(issuer, cell, at, site, "asynchronous write");
    check_ordered_after_readers(issuer, cell, at, site, false);
    if (proxy == Proxy::kAsync) check_fenced(issuer, cell, at, site, "asynchronous write");
    set_writer(cell, issuer.index, issuer.clock.epoch, site, proxy);
    cell.is_write_in_flight = true;
  });
}

void end_async_write(uint32_t address, uint32_t bytes, int actor, Epoch epoch, Site site, Proxy proxy) {
  if (!options.check_races) return;
  for_each_cell(address, bytes, [&](Cell& cell, uint32_t) {
    set_writer(cell, actor, epoch, site, proxy);
    cell.is_write_in_flight = false;
  });
}

void begin_async_read(const Thread& issuer, uint32_t address, uint32_t bytes, Site site) {
  if (!options.check_races) return;
  for_each_cell(address, bytes, [&](Cell& cell, uint32_t at) {
    check_ordered_after_write(issuer, cell, at, site, "asynchronous read");
    check_is_written(cell, at, site);
    check_fenced(issuer, cell, at, site, "asynchronous read");
    ++cell.async_reads;
    cell.async_reader = static_cast<int16_t>(issuer.index);
    cell.async_read_site = site;
  });
}

void end_async_read(uint32_t address, uint32_t bytes, int actor, Epoch epoch, Site site) {
  if (!options.check_races) return;
  const Readers entry = reader_entry(actor, epoch, site, false);
  for_each_cell(address, bytes, [&](Cell& cell, uint32_t) {
    --cell.async_reads;
    add_reader(cell, entry, nullptr);
  });
}

void register_global(const void* address, size_t bytes, const char* name) {
  global_ranges.push_back({static_cast<const uint8_t*>(address), bytes, name});
}

void unregister_globals() {
  global_ranges.clear();
  last_range = 0;
}

void* allocate_global(size_t bytes) {
  constexpr size_t kAlignment = 256;  // cudaMalloc's
  void* const pointer = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (pointer != nullptr) register_global(pointer, bytes, "an allocation");
  return pointer;
}

void free_global(void* pointer) {
  const auto starts_there = [&](const Range& range) { return range.begin == pointer; };
  global_ranges.erase(std::remove_if(global_ranges.begin(), global_ranges.end(), starts_there), global_ranges.end());
  std::free(pointer);
}

void set_argument_range(const void* address, size_t bytes) {
  argument_range = {static_cast<const uint8_t*>(address), bytes, "arguments"};
}

void check_global(const void* address, size_t bytes, const char* access, Site site) {
  if (global_ranges.empty()) return;
  const auto* first = static_cast<const uint8_t*>(address);
  if (last_range < global_ranges.size() && global_ranges[last_range].contains(first, bytes)) return;
  const Range* nearest = nullptr;  // the range that begins last at or before the address
  for (size_t i = 0; i < global_ranges.size(); ++i) {
    const Range& range = global_ranges[i];
    if (range.contains(first, bytes)) {
      last_range = i;
      return;
    }
    if (range.begin <= first && (nearest == nullptr || range.begin > nearest->begin)) nearest = &range;
  }
  if (nearest == nullptr) {
    fail("OUT OF BOUNDS: global %s of %zu bytes at %p, before every registered tensor, at %s", access, bytes, address,
         source_line(site).c_str());
  }
  fail("OUT OF BOUNDS: global %s of %zu bytes at offset %td of %s, which has %zu, at %s", access, bytes,
       first - nearest->begin, nearest->name.c_str(), nearest->bytes, source_line(site).c_str());
}

void check_access(const void* address, size_t bytes, Access access, Site site) {
  if (current == nullptr) return;  // host code of the same file
  if (stacks.contains(address)) {
    if (access != Access::kAtomic) check_accumulators(address, access == Access::kWrite, site);
    return;
  }
  const auto* first = static_cast<const uint8_t*>(address);
  const uint32_t size = static_cast<uint32_t>(bytes);
  constexpr size_t kSlack = 65536;
  if (static_cast<size_t>(first - (shared_base - kSlack)) < kMaxSharedBytes + 2 * kSlack) {
    const auto at = static_cast<uint32_t>(kSharedWindow + (first - shared_base));
    shared_pointer(at, size, site);
    switch (access) {
      case Access::kRead:
        counters.shared_load_bytes += bytes;
        record_read(*current, at, size, site);
        break;
      case Access::kWrite:
        counters.shared_store_bytes += bytes;
        record_write(*current, at, size, site);
        break;
      case Access::kAtomic:
        record_atomic(*current, at, size, site);
        break;
    }
    return;
  }
  if (image_range().contains(first, bytes) || argument_range.contains(first, bytes)) return;
  check_global(address, bytes, access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic", site);
  if (access == Access::kRead) counters.global_load_bytes += bytes;
  if (access == Access::kWrite) counters.global_store_bytes += bytes;
}

}  // namespace simt
