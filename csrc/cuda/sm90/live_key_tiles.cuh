// Live key tiles on their way from the mask to the consumers of a block: the producer warp walks the block's words of
// the mask and fills one stage of a ring a tile that is live for any consumer.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <tensor_map.cuh>

#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/sm90/config.h"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/smem_tile.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "math/block_mask.h"
#include "math/work_range.h"

namespace adasplash2::cuda::sm90 {

// Calls body(tile, live) for the live key tiles, ascending, in all lanes of the calling warp: bit c of `live` says that
// one of the row groups 4 c ... 4 c + 3 has work in the tile. The first num_tiles tiles of num_groups rows of the mask.
template <int kConsumers, typename Body>
__device__ __forceinline__ void for_each_live_key_tile(const uint32_t* g_rows, int num_groups, int words_per_row,
                                                       int num_tiles, const Body& body) {
  constexpr int kGroups = kWgmmaM / kMaskRows;
  const int lane = lane_id(), num_words = ceil_div(num_tiles, 32);
  for (int first_word = 0; first_word < num_words; first_word += kWarpSize) {
    // A lane a word: a load of the warp brings 1024 tiles.
    uint32_t words[kConsumers] = {}, any = 0;
    if (first_word + lane < num_words) {
#pragma unroll
      for (int group = 0; group < kConsumers * kGroups; ++group) {
        if (group < num_groups) words[group / kGroups] |= g_rows[int64_t(group) * words_per_row + first_word + lane];
      }
    }
#pragma unroll
    for (int consumer = 0; consumer < kConsumers; ++consumer) any |= words[consumer];
    for (uint32_t lanes = __ballot_sync(kAllLanes, any != 0); lanes != 0; lanes &= lanes - 1) {
      const int source = __ffs(static_cast<int>(lanes)) - 1;
      uint32_t bits[kConsumers], left = 0;
#pragma unroll
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        bits[consumer] = __shfl_sync(kAllLanes, words[consumer], source);
        left |= bits[consumer];
      }
      for (; left != 0; left &= left - 1) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        uint32_t live = 0;
#pragma unroll
        for (int consumer = 0; consumer < kConsumers; ++consumer) live |= (bits[consumer] >> bit & 1u) << consumer;
        body((first_word + source) * 32 + bit, live);
      }
    }
  }
}

// Overwrites the rows [first_row, kRows) of a tile with zeros: one warp, and what it writes is ordered before the wgmma
// of those who wait for this warp.
template <int kRows, int kCols>
__device__ __forceinline__ void clear_rows(uint8_t* tile, int first_row) {
  using Tile = SmemTile<kRows, kCols>;
  constexpr int kChunks = kCols / 8;
  for (int chunk = lane_id(); chunk < (kRows - first_row) * kChunks; chunk += kWarpSize) {
    *reinterpret_cast<uint4*>(tile + Tile::offset(first_row + chunk / kChunks, chunk % kChunks)) = uint4{};
  }
  ptx::fence_proxy_async();
}

enum class StageTiles { kKeys, kKeysAndValues };

// A ring of stages, each a tile of keys, the tile of values beside it where they are wanted, and an entry: consumers
// read no mask.
template <int kStages_, int kConsumers, int kHeadDim, StageTiles kTiles = StageTiles::kKeysAndValues>
struct LiveTileRing {
  static constexpr int kStages = kStages_;
  using Tile = SmemTile<kMaskKeys, kHeadDim>;
  struct Position : RingPosition<kStages> {
    uint32_t edge_parity = 0;  // the producer's, of the barrier of edge tiles
  };
  static constexpr int kStageBytes = (kTiles == StageTiles::kKeys ? 1 : 2) * Tile::kBytes;
  static constexpr int kBarriers = kStages * kStageBytes;
  static constexpr int kEdgeFull = kBarriers + Ring<kStages>::kBarrierBytes;
  static constexpr int kEntries = kEdgeFull + 8;
  static constexpr int kSmemBytes = kEntries + kStages * 4;
  static constexpr int kEnd = -1, kBlocked = -2, kNone = -1;

  uint8_t*
      smem;  // stages | barriers | barrier of the edge tile | int [kStages]: the tile and who has work in it, or kEnd
  uint32_t s_stages;
  Ring<kStages> ring;

  __device__ __forceinline__ explicit LiveTileRing(uint8_t* smem_)
      : smem(smem_), s_stages(ptx::shared_address(smem_)), ring{s_stages + kBarriers} {}

  __device__ __forceinline__ uint32_t s_key(int stage) const { return s_stages + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t s_value(int stage) const { return s_key(stage) + Tile::kBytes; }
  __device__ __forceinline__ int& entry(int stage) const { return reinterpret_cast<int*>(smem + kEntries)[stage]; }

  // One thread; fence_mbarrier_init() and a barrier of the block follow.
  __device__ __forceinline__ void init() const {
    ring.init(kConsumers * kWarpgroupWarps);
    ptx::mbarrier_init(s_stages + kEdgeFull, 1);
  }

  // Producer warp. The entry is seen by whoever sees the stage full.
  __device__ __forceinline__ void load_keys(const Position& position, int tile, uint32_t live, const TensorMap* key,
                                            int kv_head, int batch) const {
    if (lane_id() != 0) return;
    open(position, tile, live);
    Tile::load(s_key(position.stage), key, ring.announce(position.stage, Tile::kBytes), tile * kMaskKeys, kv_head,
               batch);
  }

  // Keys and values; of the tile in which the keys end early (`length`), those that take no part are cleared before
  // anybody sees them: they may be NaN, and 0 * NaN must reach nothing.
  __device__ __forceinline__ void load_keys_and_values(Position& position, int tile, uint32_t live,
                                                       const TensorMap* key, const TensorMap* value, int kv_head,
                                                       int batch, const WorkRange& range) const {
    const int lane = lane_id(), stage = position.stage, edge_row = range.length - tile * kMaskKeys;
    const bool is_edge = range.length < range.num_keys && edge_row < kMaskKeys;
    const uint32_t edge_full = s_stages + kEdgeFull;
    if (lane == 0) {
      open(position, tile, live);
      if (is_edge) ptx::mbarrier_arrive_expect_tx(edge_full, kStageBytes);
      const uint32_t full = is_edge ? edge_full : ring.announce(stage, kStageBytes);
      Tile::load(s_key(stage), key, full, tile * kMaskKeys, kv_head, batch);
      Tile::load(s_value(stage), value, full, tile * kMaskKeys, kv_head, batch);
    }
    if (!is_edge) return;
    ptx::mbarrier_wait(edge_full, position.edge_parity);
    position.edge_parity ^= 1;
    clear_rows<kMaskKeys, kHeadDim>(smem + stage * kStageBytes, edge_row);
    clear_rows<kMaskKeys, kHeadDim>(smem + stage * kStageBytes + Tile::kBytes, edge_row);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(ring.full(stage));
  }

  // No more tiles for now.
  __device__ __forceinline__ void close(const Position& position) const {
    if (lane_id() != 0) return;
    ring.wait_free(position.stage, position.parity);
    entry(position.stage) = kEnd;
    ptx::mbarrier_arrive(ring.full(position.stage));
  }

  // Consumer, all its threads: frees a stage.
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (lane_id() == 0) ring.release(stage);
  }
  // Consumer: the next tile with work for it, in a stage that is full, or kEnd after the last. A consumer that still
  // holds a stage gets kBlocked where the ring has come round to it: nothing more comes before that is released.
  __device__ __forceinline__ int next(Position& position, int consumer, int& stage, int held = kNone) const {
    while (position.stage != held) {
      stage = position.stage;
      ring.wait(stage, position.parity);
      const int found = entry(stage);
      position.advance();
      if (found != kEnd && (found >> consumer & 1) != 0) return found >> kConsumers;
      release(stage);
      if (found == kEnd) return kEnd;
    }
    return kBlocked;
  }

 private:
  __device__ __forceinline__ void open(const Position& position, int tile, uint32_t live) const {
    ring.wait_free(position.stage, position.parity);
    entry(position.stage) = tile << kConsumers | static_cast<int>(live);
  }
};

}  // namespace adasplash2::cuda::sm90
