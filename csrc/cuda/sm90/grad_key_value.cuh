// Backward, dk and dv: over the live query blocks of 128 keys, dV = P^T dO, dK = sigma dS^T Q (docs/algorithm.md,
// section 5). The heads of a group are added up inside the block, in a fixed order: no atomics, the same bits each run.
//
//   in   query, key, value, grad_out, tau, delta, block_mask by columns
//   out  grad_key (B, Hkv, Nk, D), grad_value (B, Hkv, Nk, Dv), data nullable: not wanted
//
// Blocks stay, and take blocks of 128 keys one after the other (work_queue.cuh). A producer warp brings these keys and
// their values, walks the mask, and sends blocks of 64 queries with their grad_out through a ring; a guard warp adds
// tau and delta, and clears what may be NaN and must reach nothing. Two consumer warpgroups own 64 keys each and work
// on the transposes S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are left operands as they come out of the
// accumulators.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <dynamic_smem.cuh>
#include <tensor_map.cuh>

#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/config.h"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/smem_tile.cuh"
#include "cuda/sm90/warpgroup.cuh"
#include "cuda/sm90/work_queue.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "math/block_mask.h"
#include "math/entmax.h"

namespace adasplash2::cuda::sm90 {

struct GradKeyValueParams {
  GradParams pass;
  WorkQueue queue;
  TensorMap query, grad_out;       // boxes of kBlockM rows
  TensorMap key, value;            // boxes of kMaskKeys rows
  TensorMap grad_key, grad_value;  // boxes of a warp's 16 rows; unused where not wanted
};

// The keys of an item.
struct KeyBlock {
  int batch, kv_head, group_size, first_head, key_begin;
  WorkRange range;

  __device__ __forceinline__ KeyBlock(const AttentionProblem& problem, BlockAt block, int block_keys)
      : batch(block.y_and_z >> 16),
        kv_head(block.y_and_z & 0xffff),
        group_size(static_cast<int>(problem.num_heads) / static_cast<int>(problem.num_kv_heads)),
        first_head(kv_head * group_size),
        key_begin(block.x * block_keys),
        range(work_range(problem, batch)) {}
};

// The shared memory of a block, in bytes from its beginning.
template <int kHeadDim>
struct GradKeyValueSmem {
  using Config = GradKeyValueConfig<kHeadDim>;
  using Tile = SmemTile<64, kHeadDim>;
  static constexpr int kStatBytes = Config::kBlockM * 4;

  static constexpr int kSlotBytes = 2 * Config::kConsumers * Tile::kBytes;     // keys and values of an item
  static constexpr int kSlots = 0;                                             // [kSlots][2][kConsumers] tiles
  static constexpr int kQuery = kSlots + Config::kSlots * kSlotBytes;          // [kStages] tiles
  static constexpr int kGradOut = kQuery + Config::kStages * Tile::kBytes;     // [kStages] tiles
  static constexpr int kTau = kGradOut + Config::kStages * Tile::kBytes;       // [kStages][kBlockM] float
  static constexpr int kDelta = kTau + Config::kStages * kStatBytes;           // [kStages][kBlockM] float
  static constexpr int kBlocks = kDelta + Config::kStages * kStatBytes;        // [kStages] StageEntry
  static constexpr int kRing = kBlocks + Config::kStages * 8;                  // barriers of the ring
  static constexpr int kReady = kRing + Ring<Config::kStages>::kBarrierBytes;  // [kStages] barriers
  static constexpr int kItems = kReady + Config::kStages * 8;
  static constexpr int kBytes = kItems + ItemSlots<Config::kSlots>::kSmemBytes;
  static_assert(kItems % 8 == 0, "mbarriers are 8-byte aligned");
  static_assert(kBytes <= kSmemPerBlock, "more shared memory than a block can have");

  static constexpr int kStageBytes = 2 * Tile::kBytes;  // that TMA brings
};

// What a stage of the ring holds.
struct alignas(8) StageEntry {
  int row_begin;  // kNone: there are no more
  int head_live;  // the head, above a bit for each consumer: has the block work for it?
  static constexpr int kNone = -1;
};

// Calls body(row_begin, live) for the live blocks of kBlockM rows of a head, ascending, in all lanes of the calling
// warp: bit c of `live` says that the block is live in column c. A column is group_words words.
template <int kBlockM, int kColumns, typename Body>
__device__ __forceinline__ void for_each_live_query_block(const uint32_t* g_columns, int num_columns, int group_words,
                                                          const Body& body) {
  constexpr int kGroups = kBlockM / kMaskRows;
  static_assert(kGroups == 4 && kColumns <= kGroups,
                "the bits of a block are a hexadecimal digit, its columns' another");
  constexpr uint32_t kOnes = 0x11111111u;
  for (int first_word = 0; first_word < group_words; first_word += kWarpSize) {
    // A lane a word: a load of the warp brings 16384 rows. Bit c of a digit: is the block live in column c?
    const int word = first_word + lane_id();
    uint32_t live_of_word = 0;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      uint32_t groups = 0;
      if (word < group_words && column < num_columns) groups = g_columns[column * group_words + word];
      groups |= groups >> 1;
      live_of_word |= ((groups | groups >> 2) & kOnes) << column;
    }
    for (uint32_t lanes = __ballot_sync(kAllLanes, live_of_word != 0); lanes != 0; lanes &= lanes - 1) {
      const int source = __ffs(static_cast<int>(lanes)) - 1;
      uint32_t live = __shfl_sync(kAllLanes, live_of_word, source);
      int row_begin = (first_word + source) * 32 * kMaskRows;
      while (live != 0) {
        const int skipped = (__ffs(static_cast<int>(live)) - 1) / kGroups;
        live >>= skipped * kGroups;
        row_begin += skipped * kBlockM;
        body(row_begin, static_cast<int>(live & ((1u << kColumns) - 1u)));
        live &= ~15u;
      }
    }
  }
}

// One block's work: what its producer and its consumers have in common.
template <typename Element, int kHeadDim, AlphaKind kKind>
struct GradKeyValueBlock {
  using Config = GradKeyValueConfig<kHeadDim>;
  using Smem = GradKeyValueSmem<kHeadDim>;
  using Tile = typename Smem::Tile;
  using Slots = ItemSlots<Config::kSlots>;
  static constexpr int kStages = Config::kStages;
  static constexpr int kAccumulator = kHeadDim / 2;    // registers of 64 keys x kHeadDim
  static constexpr int kScores = Config::kBlockM / 2;  // registers of 64 keys x kBlockM queries
  static constexpr int kDimSteps = kHeadDim / kWgmmaK, kQuerySteps = Config::kBlockM / kWgmmaK;

  const GradKeyValueParams& params;
  uint8_t* smem;
  uint32_t s_base;
  Ring<kStages> ring;
  Slots slots;

  __device__ __forceinline__ explicit GradKeyValueBlock(const GradKeyValueParams& params_)
      : params(params_),
        smem(dynamic_smem()),
        s_base(ptx::shared_address(smem)),
        ring{s_base + Smem::kRing},
        slots(smem + Smem::kItems) {}

  __device__ __forceinline__ StageEntry* block_of(int stage) const {
    return reinterpret_cast<StageEntry*>(smem + Smem::kBlocks) + stage;
  }

  // The barrier that says that the guard has seen a stage.
  __device__ __forceinline__ uint32_t ready(int stage) const { return s_base + Smem::kReady + stage * 8; }

  // The tiles of a consumer in a slot.
  __device__ __forceinline__ uint32_t s_key(int slot, int consumer) const {
    return s_base + Smem::kSlots + slot * Smem::kSlotBytes + consumer * Tile::kBytes;
  }
  __device__ __forceinline__ uint32_t s_value(int slot, int consumer) const {
    return s_key(slot, consumer) + Config::kConsumers * Tile::kBytes;
  }

  // ---- producer: one warp ----

  __device__ __forceinline__ void produce() const {
    const bool issues = lane_id() == 0;
    typename Slots::Position item;
    RingPosition<kStages> position;
    const auto send_item = [&](BlockAt taken) {
      const KeyBlock block(params.pass.problem, taken, Config::kBlockN);
      if (issues) load_keys_and_values(item, taken, block);
      item.advance();
      const BlockMaskShape shape(block.range.num_queries, block.range.num_keys);
      const int tile = block.key_begin / kMaskKeys;
      const uint32_t* g_columns =
          params.pass.block_mask + int64_t(tile) * shape.group_words() +
          (block.batch * params.pass.problem.num_heads + block.first_head) * shape.column_words();
      for (int head = block.first_head; head < block.first_head + block.group_size; ++head) {
        const auto visit = [&](int row_begin, int live) {
          if (issues) send(position, block.batch, head, row_begin, live);
          position.advance();
        };
        for_each_live_query_block<Config::kBlockM, Config::kConsumers>(g_columns, shape.num_key_tiles - tile,
                                                                       shape.group_words(), visit);
        g_columns += shape.column_words();
      }
      if (issues) {
        ring.wait_free(position.stage, position.parity);
        *block_of(position.stage) = {StageEntry::kNone, 0};
        ptx::mbarrier_arrive(ring.full(position.stage));
      }
      position.advance();
    };
    if constexpr (Config::kStays) {
      for_each_taken_item(params.queue, send_item);
    } else {
      send_item(params.queue.block_of(blockIdx.x));
    }
    if (issues) slots.close(item);
  }

  __device__ __forceinline__ void load_keys_and_values(const typename Slots::Position& item, BlockAt taken,
                                                       const KeyBlock& block) const {
    const uint32_t full = slots.fill(item, taken, Smem::kSlotBytes);
#pragma unroll
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      const int row = block.key_begin + consumer * kMaskKeys;
      Tile::load(s_key(item.stage, consumer), &params.key, full, row, block.kv_head, block.batch);
      Tile::load(s_value(item.stage, consumer), &params.value, full, row, block.kv_head, block.batch);
    }
  }

  __device__ __forceinline__ void send(const RingPosition<kStages>& position, int batch, int head, int row_begin,
                                       int live) const {
    const int stage = position.stage;
    ring.wait_free(stage, position.parity);
    *block_of(stage) = {row_begin, head << Config::kConsumers | live};
    const uint32_t full = ring.announce(stage, Smem::kStageBytes);
    Tile::load(s_base + Smem::kQuery + stage * Tile::kBytes, &params.query, full, row_begin, head, batch);
    Tile::load(s_base + Smem::kGradOut + stage * Tile::kBytes, &params.grad_out, full, row_begin, head, batch);
  }

  // ---- guard: one warp ----

  // Looks at every stage before the consumers do, and adds tau and delta (not by TMA: its boxes start at multiples of
  // 16 bytes, rows of heads do not). Rows of padding and rows whose tau is NaN may hold NaN, and 0 * NaN must reach
  // nothing: their query, grad_out and delta become zeros, and the tau of padding +inf, which has no gaps.
  __device__ __forceinline__ void guard() const {
    typename Slots::Position item;
    RingPosition<kStages> position;
    for (BlockAt taken; (taken = slots.wait(item)).x != Slots::kNone; item.advance()) {
      const int batch = taken.y_and_z >> 16;
      const WorkRange range = work_range(params.pass.problem, batch);
      for (bool is_last = false; !is_last; position.advance()) {
        const int stage = position.stage;
        ring.wait(stage, position.parity);
        const StageEntry block = *block_of(stage);
        is_last = block.row_begin == StageEntry::kNone;
        if (!is_last) complete(stage, range, batch, block.head_live >> Config::kConsumers, block.row_begin);
        __syncwarp();
        if (lane_id() == 0) ptx::mbarrier_arrive(ready(stage));
      }
    }
  }

  __device__ __forceinline__ void complete(int stage, const WorkRange& range, int batch, int head,
                                           int row_begin) const {
    constexpr int kRowsPerLane = Config::kBlockM / kWarpSize;
    const int64_t first_row = row_index(params.pass.problem, batch, head, row_begin) + lane_id();
    const int num_rows = range.num_live_rows() - row_begin - lane_id();
    float tau[kRowsPerLane], delta[kRowsPerLane];
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      const bool is_padding = i * kWarpSize >= num_rows;
      tau[i] = is_padding ? INFINITY : params.pass.tau[first_row + i * kWarpSize];
      delta[i] = is_padding ? 0.0f : params.pass.delta[first_row + i * kWarpSize];
    }
    float* s_tau = reinterpret_cast<float*>(smem + Smem::kTau + stage * Smem::kStatBytes) + lane_id();
    float* s_delta = reinterpret_cast<float*>(smem + Smem::kDelta + stage * Smem::kStatBytes) + lane_id();
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      s_tau[i * kWarpSize] = tau[i];
      s_delta[i * kWarpSize] = delta[i];  // that of a row whose tau is NaN is 0
      const bool is_bad = !(tau[i] < INFINITY);
      for (uint32_t bad_rows = __ballot_sync(kAllLanes, is_bad); bad_rows != 0; bad_rows &= bad_rows - 1) {
        const int row = i * kWarpSize + __ffs(static_cast<int>(bad_rows)) - 1, chunk = lane_id();
        if (chunk >= kHeadDim / kChunkElements<Element>) continue;
        uint8_t* s_chunk = smem + stage * Tile::kBytes + Tile::offset(row, chunk);
        *reinterpret_cast<uint4*>(s_chunk + Smem::kQuery) = uint4{};
        *reinterpret_cast<uint4*>(s_chunk + Smem::kGradOut) = uint4{};
      }
    }
    ptx::fence_proxy_async();
  }

  // ---- consumers ----

  // acc = left right^T over the head dim: this consumer's keys or values with the rows of a stage.
  // NOTE: keys in registers would spare shared memory a third of its reads, but ptxas 13.0 lets other values overwrite
  // them inside of the loop (seen in its code and in wrong results), and at head dim 128 there is no room for them.
  __device__ __forceinline__ static void multiply_transposed(float (&acc)[kScores], uint32_t s_left, uint32_t s_right) {
#pragma unroll
    for (int k = 0; k < kDimSteps; ++k) {
      ptx::wgmma_ss<Element, ptx::Major::kK, ptx::Major::kK>(acc, Tile::k_major(s_left, 0, k),
                                                             Tile::k_major(s_right, 0, k), k != 0);
    }
  }

  // acc += left (64 keys x kBlockM queries, rounded) * the rows of a stage.
  __device__ __forceinline__ static void multiply_add(float (&acc)[kAccumulator],
                                                      const uint32_t (&left)[kQuerySteps][4], uint32_t s_right) {
#pragma unroll
    for (int k = 0; k < kQuerySteps; ++k) {
      ptx::wgmma_rs<Element, ptx::Major::kMn>(acc, left[k], Tile::mn_major(s_right, k), true);
    }
  }

  template <int kConsumer>
  __device__ __forceinline__ void consume() const {
    typename Slots::Position item;
    RingPosition<kStages> position;
    for (BlockAt taken; (taken = slots.wait(item)).x != Slots::kNone; item.advance()) {
      consume<kConsumer>(KeyBlock(params.pass.problem, taken, Config::kBlockN), item.stage, position);
      slots.release(item);
    }
  }

  // A consumer's part of an item, whose keys and values stay in their slot.
  template <int kConsumer>
  __device__ __forceinline__ void consume(const KeyBlock& keys, int slot, RingPosition<kStages>& position) const {
    const AttentionProblem& problem = params.pass.problem;
    const WorkRange& range = keys.range;
    const int lane = lane_id(), warp_row = warp_id() % kWarpgroupWarps * kMmaM;
    const int tile_begin = keys.key_begin + kConsumer * kMaskKeys, batch = keys.batch, kv_head = keys.kv_head;
    const uint32_t s_key = this->s_key(slot, kConsumer), s_value = this->s_value(slot, kConsumer);

    // Phase 1: clear the sums.
    int first_row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      first_row[half] = range.first_row_of(tile_begin + warp_row + accumulator_row(lane, half));
    }
    float grad_key[kAccumulator], grad_value[kAccumulator];
#pragma unroll
    for (int i = 0; i < kAccumulator; ++i) grad_key[i] = grad_value[i] = 0.0f;

    // Phase 2: the live query blocks of all heads of the group.
    const float scale = score_scale(problem);
    Entmax<kKind> entmax{static_cast<float>(problem.alpha)};
    float to_z = (entmax.alpha - 1.0f) * scale;
    for (bool is_last = false; !is_last; position.advance()) {
      const int stage = position.stage;
      ptx::mbarrier_wait(ready(stage), position.parity);
      const StageEntry block = *block_of(stage);
      is_last = block.row_begin == StageEntry::kNone;  // has work for nobody
      const int row_begin = block.row_begin;
      [[maybe_unused]] const int head = block.head_live >> Config::kConsumers;  // for its alpha
      if ((block.head_live >> kConsumer & 1) != 0) {
        const uint32_t s_query = s_base + Smem::kQuery + stage * Tile::kBytes;
        const uint32_t s_grad_out = s_base + Smem::kGradOut + stage * Tile::kBytes;

        float score[kScores], grad_score[kScores];  // transposed: keys x queries
        ptx::wgmma_pin(score);
        ptx::wgmma_pin(grad_score);
        ptx::wgmma_fence();
        multiply_transposed(score, s_key, s_query);
        ptx::wgmma_commit();
        multiply_transposed(grad_score, s_value, s_grad_out);  // dP first
        ptx::wgmma_commit();

        if constexpr (kKind == AlphaKind::kGeneral) {
          entmax.alpha = head_alpha(problem, batch, head);
          to_z = (entmax.alpha - 1.0f) * scale;
        }
        const float2* s_tau = reinterpret_cast<const float2*>(smem + Smem::kTau + stage * Smem::kStatBytes);
        const float2* s_delta = reinterpret_cast<const float2*>(smem + Smem::kDelta + stage * Smem::kStatBytes);
        // Where the first row sees the last key, every row does: no pair of the block is masked.
        const bool is_edge = range.num_visible_keys(row_begin) < tile_begin + kMaskKeys;

        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(score);
        if (is_edge) {
#pragma unroll
          for (int i = 0; i < kScores; ++i) {
            const int row = row_begin + i / 4 * kMmaN + accumulator_col(lane, i % 2);
            if (row < first_row[i / 2 % 2]) score[i] = -INFINITY;
          }
        }
        uint32_t prob[kQuerySteps][4];
#pragma unroll
        for (int i = 0; i < kScores; i += 2) {
          const float2 tau = s_tau[(i / 4 * kMmaN + accumulator_col(lane, 0)) / 2];
          const float gap[2] = {fmaxf(score[i] * to_z - tau.x, 0.0f), fmaxf(score[i + 1] * to_z - tau.y, 0.0f)};
#pragma unroll
          for (int e = 0; e < 2; ++e) score[i + e] = entmax.weight(gap[e]);
          prob[i / 8][i / 2 % 4] = ptx::pack<Element>(entmax.prob(gap[0], score[i]), entmax.prob(gap[1], score[i + 1]));
        }

        ptx::wgmma_pin(grad_value);
        ptx::wgmma_fence();
        multiply_add(grad_value, prob, s_grad_out);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(grad_score);
#pragma unroll
        for (int i = 0; i < kScores; i += 2) {
          const float2 delta = s_delta[(i / 4 * kMmaN + accumulator_col(lane, 0)) / 2];
          grad_score[i] = score[i] * (grad_score[i] - delta.x);
          grad_score[i + 1] = score[i + 1] * (grad_score[i + 1] - delta.y);
        }
        uint32_t left[kQuerySteps][4];
#pragma unroll
        for (int k = 0; k < kQuerySteps; ++k) accumulator_to_a<Element>(left[k], grad_score, k);

        ptx::wgmma_pin(grad_key);
        ptx::wgmma_fence();
        multiply_add(grad_key, left, s_query);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(grad_value);
        ptx::wgmma_pin(grad_key);
      }
      __syncwarp();
      if (lane == 0) ring.release(stage);
    }

    // Phase 3: store, through the tiles of this consumer's keys and values. Keys that take no part may hold NaN, which
    // the products have left in their rows.
    const float grad_scale = static_cast<float>(problem.scale);
    const int key_end = min(range.length, range.num_keys);
#pragma unroll
    for (int i = 0; i < kAccumulator; ++i) {
      const bool takes_part = tile_begin + warp_row + accumulator_row(lane, i / 2 % 2) < key_end;
      grad_key[i] = takes_part ? grad_key[i] * grad_scale : 0.0f;
      grad_value[i] = takes_part ? grad_value[i] : 0.0f;
    }
    const int warp_key = tile_begin + warp_row;
    ptx::barrier_sync<2 + kConsumer, kWarpgroupThreads>();
    if (params.pass.grad_key.data != nullptr) {
      store_warp_rows<Element, Tile>(&params.grad_key, s_key, warp_row, grad_key, warp_key, kv_head, batch);
    }
    if (params.pass.grad_value.data != nullptr) {
      store_warp_rows<Element, Tile>(&params.grad_value, s_value, warp_row, grad_value, warp_key, kv_head, batch);
    }
    if (lane == 0) ptx::tma_store_wait_read<0>();
  }
};

template <typename Element, int kHeadDim, AlphaKind kKind>
__global__ void __launch_bounds__(GradKeyValueConfig<kHeadDim>::kThreads, 1)
    grad_key_value_kernel(const __grid_constant__ GradKeyValueParams params) {
  using Config = GradKeyValueConfig<kHeadDim>;
  const GradKeyValueBlock<Element, kHeadDim, kKind> block(params);
  if (threadIdx.x == 0) {
    block.ring.init(Config::kConsumers * kWarpgroupWarps);
    for (int stage = 0; stage < Config::kStages; ++stage) ptx::mbarrier_init(block.ready(stage), 1);
    block.slots.init(Config::kConsumers * kWarpgroupWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warpgroup_id() == 0) {
    ptx::setmaxnreg_decrease<Config::kProducerRegisters>();
    if (warp_id() == 0) block.produce();
    if (warp_id() == 1) block.guard();
  } else {
    ptx::setmaxnreg_increase<Config::kConsumerRegisters>();
    if (warpgroup_id() == 1) {
      block.template consume<0>();
    } else {
      block.template consume<1>();
    }
  }
}

}  // namespace adasplash2::cuda::sm90
