// Blocks that stay: a launch has as many as the GPU runs at once, and each takes one item of the pass after the other,
// a block of rows of a head. So a block fetches what its next item needs while it still works on the last.
//
// The producer warp takes the items, from a counter: which block gets which decides when it runs, never what comes out.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/pass_params.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/ring.cuh"
#include "cuda/tile/row_reduce.cuh"

namespace adasplash2::cuda::sm90 {

// The blocks of all heads, in the order in which they are taken: that of their live tiles, where it is there, or else a
// group of heads after the other, in a group the first block of every head, then the second.
struct WorkQueue {
  uint32_t num_blocks, num_heads, num_items;  // blocks of a head, heads of a sequence
  uint32_t group_size;                        // of heads
  bool is_last_first;                         // blocks of a head are taken from the last one on
  const BlockAt* order;                       // (num_items,), nullable (any_arch/work_order.cuh)
  uint32_t* num_taken;                        // beyond the first item of each block; 0 at a launch of fewer blocks

  __device__ __forceinline__ BlockAt block_of(uint32_t item) const {
    if (order != nullptr) return order[item];
    const uint32_t group = item / (group_size * num_blocks), first_head = group * group_size;
    const uint32_t place = item - first_head * num_blocks, size = min(group_size, num_items / num_blocks - first_head);
    const uint32_t x = place / size, head = first_head + place % size;
    return {is_last_first ? num_blocks - 1 - x : x, head % num_heads | head / num_heads << 16};
  }
};

// Calls body(BlockAt) for the items that this block takes, in all lanes of the calling warp.
template <typename Body>
__device__ __forceinline__ void for_each_taken_item(const WorkQueue& queue, const Body& body) {
  const bool has_counter = gridDim.x < queue.num_items;
  for (uint32_t item = blockIdx.x, next = 0; item < queue.num_items; item = __shfl_sync(kAllLanes, next, 0)) {
    // Asked for before the work on this item begins: the answer takes as long as a tile.
    if (lane_id() == 0) next = gridDim.x + (has_counter ? atomicAdd(queue.num_taken, 1u) : 0);
    body(queue.block_of(item));
  }
}

// The items of a block on their way from the producer warp to the consumers, and the barriers of what comes with them
// by TMA: kSlots of them at a time.
template <int kSlots>
struct ItemSlots {
  using Position = RingPosition<kSlots>;
  static constexpr int kBarriers = kSlots * sizeof(BlockAt);
  static constexpr int kSmemBytes = kBarriers + Ring<kSlots>::kBarrierBytes;
  static constexpr uint32_t kNone = ~0u;  // as x: there are no more items

  uint8_t* smem;  // BlockAt [kSlots] | barriers
  Ring<kSlots> ring;

  __device__ __forceinline__ explicit ItemSlots(uint8_t* smem_)
      : smem(smem_), ring{ptx::shared_address(smem_) + kBarriers} {}

  // One thread; fence_mbarrier_init() and a barrier of the block follow.
  __device__ __forceinline__ void init(int num_consumer_warps) const { ring.init(num_consumer_warps); }

  // Producer, one thread: once all consumers have released the slot, announces an item, and returns the barrier to load
  // its `bytes` on.
  __device__ __forceinline__ uint32_t fill(const Position& position, BlockAt item, uint32_t bytes) const {
    ring.wait_free(position.stage, position.parity);
    item_of(position.stage) = item;
    return ring.announce(position.stage, bytes);
  }
  // Producer, one thread: there are no more items.
  __device__ __forceinline__ void close(const Position& position) const { fill(position, {kNone, 0}, 0); }

  // All threads of a consumer, or of another warp that is done with the item before the consumers are.
  __device__ __forceinline__ BlockAt wait(const Position& position) const {
    ring.wait(position.stage, position.parity);
    return item_of(position.stage);
  }
  // Consumer, all its threads.
  __device__ __forceinline__ void release(const Position& position) const {
    __syncwarp();
    if (lane_id() == 0) ring.release(position.stage);
  }

 private:
  __device__ __forceinline__ BlockAt& item_of(int slot) const { return reinterpret_cast<BlockAt*>(smem)[slot]; }
};

}  // namespace adasplash2::cuda::sm90
