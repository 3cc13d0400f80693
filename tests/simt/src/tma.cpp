#include "tma.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <tensor_map.cuh>

#include "counters.h"
#include "mbarrier.h"
#include "shadow.h"

namespace simt {

namespace {

using adasplash2::TensorMap;
using adasplash2::TensorMapElement;
using adasplash2::TensorMapShape;

// One copy between a box of a tensor and shared memory.
struct BoxCopy {
  TensorMapShape shape;
  std::array<int32_t, 5> corner;
  uint32_t shared_address;
  Site site;

  uint32_t element_bytes() const { return shape.element == TensorMapElement::kFloat32 ? 4 : 2; }
  uint32_t row_bytes() const { return shape.box[0] * element_bytes(); }
  uint32_t num_rows() const {
    uint32_t rows = 1;
    for (int i = 1; i < shape.rank; ++i) rows *= shape.box[i];
    return rows;
  }
  uint32_t bytes() const { return row_bytes() * num_rows(); }
};

struct Load {
  BoxCopy box;
  uint32_t mbarrier;
};
struct Store {
  BoxCopy box;
  bool is_reduction;
  int group;
};
struct ThreadStores {
  std::vector<Store> in_flight;
  int open_group = 0;
};
std::vector<Load> loads;           // of the block
std::vector<ThreadStores> stores;  // by thread

// Calls function(shared bytes, global bytes or null, first, last) for every 16-byte chunk of the box; bytes first ..
// last - 1 of the chunk lie inside the tensor, from there on at the global address.
template <typename Function>
void for_each_chunk(const BoxCopy& box, Function function) {
  constexpr uint32_t kChunkBytes = 16;
  const TensorMapShape& shape = box.shape;
  const auto* base = static_cast<const uint8_t*>(shape.base);
  const int64_t row_end = static_cast<int64_t>(shape.size[0] * box.element_bytes());
  for (uint32_t row = 0; row < box.num_rows(); ++row) {
    bool is_inside = true;
    int64_t offset = 0;
    uint32_t rest = row;
    for (int i = 1; i < shape.rank; ++i) {
      const int64_t index = int64_t{box.corner[i]} + rest % shape.box[i];
      rest /= shape.box[i];
      is_inside &= index >= 0 && index < static_cast<int64_t>(shape.size[i]);
      offset += index * static_cast<int64_t>(shape.stride_bytes[i]);
    }
    for (uint32_t column = 0; column < box.row_bytes(); column += kChunkBytes) {
      const uint32_t address =
          swizzled(box.shared_address + row * box.row_bytes() + column, static_cast<uint32_t>(shape.swizzle_bytes));
      uint8_t* shared = shared_pointer(address, kChunkBytes, box.site);
      const int64_t begin = int64_t{box.corner[0]} * box.element_bytes() + column;  // in bytes of the tensor's row
      const int64_t first = std::clamp<int64_t>(-begin, 0, kChunkBytes);
      const int64_t last = std::clamp<int64_t>(row_end - begin, first, kChunkBytes);
      if (is_inside && last > first) {
        uint8_t* global = const_cast<uint8_t*>(base) + offset + begin + first;
        check_global(global, static_cast<size_t>(last - first), "access by TMA", box.site);
        function(shared, global, first, last);
      } else {
        function(shared, static_cast<uint8_t*>(nullptr), int64_t{0}, int64_t{0});
      }
    }
  }
}

void add_elements(TensorMapElement element, uint8_t* global, const uint8_t* shared, int64_t bytes) {
  const auto add = [&](auto zero) {
    using Element = decltype(zero);
    for (int64_t i = 0; i < bytes; i += int64_t{sizeof(Element)}) {
      Element sum, term;
      std::memcpy(&sum, global + i, sizeof sum);
      std::memcpy(&term, shared + i, sizeof term);
      sum = Element(static_cast<float>(sum) + static_cast<float>(term));
      std::memcpy(global + i, &sum, sizeof sum);
    }
  };
  switch (element) {
    case TensorMapElement::kBFloat16:
      return add(__nv_bfloat16(0.0f));
    case TensorMapElement::kFloat16:
      return add(__half(0.0f));
    case TensorMapElement::kFloat32:
      return add(0.0f);
  }
}

BoxCopy box_of(const PtxCall& call, const void* map, uint32_t shared_address, int first_coordinate) {
  BoxCopy box{static_cast<const TensorMap*>(map)->shape, {}, shared_address, call.site};
  if (box.shape.rank != call.parameter()) {
    fail("TMA at %s: %d coordinates for a tensor map of rank %d", source_line(call.site).c_str(), call.parameter(),
         box.shape.rank);
  }
  for (int i = 0; i < box.shape.rank; ++i) box.corner[i] = call.s32(first_coordinate + i);
  if (box.corner[0] * static_cast<int>(box.element_bytes()) % 16 != 0) {
    fail("MISALIGNED TMA at %s: coordinate %d of the innermost dimension is no multiple of 16 bytes",
         source_line(call.site).c_str(), static_cast<int>(box.corner[0]));
  }
  const auto swizzle_bytes = static_cast<uint32_t>(box.shape.swizzle_bytes);
  const uint32_t alignment = swizzle_bytes == 0 ? 128 : std::max(128u, 8 * swizzle_bytes);
  if (shared_address % alignment != 0) {
    fail("MISALIGNED TMA at %s: shared offset %u is no multiple of %u", source_line(call.site).c_str(),
         shared_address - kSharedWindow, alignment);
  }
  shared_pointer(shared_address, box.bytes(), call.site);
  return box;
}

void complete_load(size_t index) {
  const Load load = loads[index];
  loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(index));
  for_each_chunk(load.box, [](uint8_t* shared, const uint8_t* global, int64_t first, int64_t last) {
    std::memset(shared, 0, 16);
    if (global != nullptr) std::memcpy(shared + first, global, static_cast<size_t>(last - first));
  });
  const uint32_t bytes = load.box.bytes();
  counters.tma_load_bytes += bytes;
  const TmaCompletion writer = pending_completion(load.mbarrier);
  end_async_write(load.box.shared_address, bytes, writer.actor, writer.epoch, load.box.site, Proxy::kAsync);
  complete_transaction(load.mbarrier, bytes);
}

void issue_store(const PtxCall& call, bool is_reduction) {
  const BoxCopy box = box_of(call, reinterpret_cast<const void*>(call.u64(0)), call.u32(call.parameter() + 1), 1);
  begin_async_read(*current, box.shared_address, box.bytes(), call.site);
  ThreadStores& mine = stores[current->index];
  mine.in_flight.push_back({box, is_reduction, mine.open_group});
}

void carry_out(const Store& store) {
  const BoxCopy& box = store.box;
  for_each_chunk(box, [&](const uint8_t* shared, uint8_t* global, int64_t first, int64_t last) {
    if (global == nullptr) return;
    if (store.is_reduction) {
      add_elements(box.shape.element, global, shared + first, last - first);
    } else {
      std::memcpy(global, shared + first, static_cast<size_t>(last - first));
    }
  });
  (store.is_reduction ? counters.tma_reduce_bytes : counters.tma_store_bytes) += box.bytes();
  end_async_read(box.shared_address, box.bytes(), current->index, current->clock.epoch, box.site);
}

}  // namespace

void execute_tma_load(const PtxCall& call) {
  // [destination], [map, {coordinates}], [mbarrier]
  const BoxCopy box = box_of(call, reinterpret_cast<const void*>(call.u64(1)), call.u32(0), 2);
  const uint32_t mbarrier = call.u32(2 + call.parameter());
  check_mbarrier_for_load(mbarrier, call.site);
  begin_async_write(*current, box.shared_address, box.bytes(), call.site, Proxy::kAsync);
  std::memset(shared_pointer(box.shared_address, box.bytes(), call.site), 0xff, box.bytes());
  loads.push_back({box, mbarrier});
  if (block.flip_early()) complete_load(loads.size() - 1);
}

// [map, {coordinates}], [source]
void execute_tma_store(const PtxCall& call) { issue_store(call, false); }
void execute_tma_reduce_add(const PtxCall& call) { issue_store(call, true); }
void execute_tma_prefetch(const PtxCall&) {}

void execute_tma_store_commit(const PtxCall&) { ++stores[current->index].open_group; }

// With and without .read alike: a store is carried out at the first wait that covers it.
void execute_tma_store_wait(const PtxCall& call) {
  ThreadStores& mine = stores[current->index];
  size_t num_left = 0;
  for (const Store& store : mine.in_flight) {
    if (store.group < mine.open_group - call.s32(0)) {
      carry_out(store);
    } else {
      mine.in_flight[num_left++] = store;
    }
  }
  mine.in_flight.resize(num_left);
}

void reset_tma() {
  loads.clear();
  stores.assign(block.threads.size(), ThreadStores());
}

bool complete_one_tma_load() {
  if (loads.empty()) return false;
  complete_load(options.seed >= 2 ? block.random() % loads.size() : 0);
  return true;
}

void check_no_stores_at_exit(const Thread& thread) {
  const std::vector<Store>& in_flight = stores[thread.index].in_flight;
  if (in_flight.empty()) return;
  fail("EXIT with a TMA store in flight that may still read shared memory, issued at %s",
       source_line(in_flight[0].box.site).c_str());
}

void check_no_loads_at_exit() {
  if (loads.empty()) return;
  fail("EXIT of the block with a TMA load in flight, issued at %s", source_line(loads[0].box.site).c_str());
}

}  // namespace simt
