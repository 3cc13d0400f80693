// Backward, dq, on Hopper: inputs, outputs and mathematics are those of sm80/grad_query.cuh (docs/kernels.md, "sm90").
//
// Blocks stay, and take blocks of kBlockM rows of a head one after the other (work_queue.cuh). A producer warp brings
// their Q and dO and their live key tiles, K and V, by TMA; each consumer warpgroup owns 64 rows, a warp 16 of them.
// Three products a tile: Q K^T, dO V^T, dS K.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <dynamic_smem.cuh>
#include <tensor_map.cuh>

#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/sm90/config.h"
#include "cuda/sm90/live_key_tiles.cuh"
#include "cuda/sm90/query_block.cuh"
#include "cuda/sm90/tensor_maps.cuh"
#include "cuda/sm90/warpgroup.cuh"
#include "cuda/sm90/work_queue.cuh"

namespace adasplash2::cuda::sm90 {

struct GradQueryParams {
  GradParams pass;
  WorkQueue queue;
  TensorMap query, grad_out;  // boxes of kBlockM rows
  TensorMap key, value;       // boxes of kBlockN rows
  TensorMap grad_query;       // boxes of 16 rows
};

template <int kHeadDim>
GradQueryParams with_tensor_maps(const GradParams& pass, const WorkQueue& queue) {
  using Config = GradQueryConfig<kHeadDim>;
  const AttentionProblem& problem = pass.problem;
  return {pass,
          queue,
          query_rows_map(problem, problem.query, problem.head_dim, Config::kBlockM),
          query_rows_map(problem, pass.grad_out, problem.value_head_dim, Config::kBlockM),
          key_rows_map(problem, problem.key, problem.head_dim, Config::kBlockN),
          key_rows_map(problem, problem.value, problem.value_head_dim, Config::kBlockN),
          query_rows_map(problem, pass.grad_query, problem.head_dim, kMaskRows)};
}

// Shared memory: queries | grad_out | grad_query on its way out | stages, barriers and entries of the ring | item
template <int kHeadDim>
struct GradQuerySmem {
  using Config = GradQueryConfig<kHeadDim>;
  using RowTile = SmemTile<Config::kBlockM, kHeadDim>;
  using Tiles = LiveTileRing<Config::kStages, Config::kConsumers, kHeadDim>;

  static constexpr int kQuery = 0;
  static constexpr int kGradOut = kQuery + RowTile::kBytes;
  static constexpr int kGradQuery = kGradOut + RowTile::kBytes;
  static constexpr int kTiles = kGradQuery + RowTile::kBytes;
  static constexpr int kItem = kTiles + Tiles::kSmemBytes;
  static constexpr int kBytes = kItem + ItemSlots<1>::kSmemBytes;
  static_assert(kItem % 8 == 0, "mbarriers are 8-byte aligned");
  static_assert(kBytes <= kSmemPerBlock, "more shared memory than a block can have");
};

template <typename Element, int kHeadDim, AlphaKind kKind>
struct GradQueryBlock {
  using Config = GradQueryConfig<kHeadDim>;
  using Smem = GradQuerySmem<kHeadDim>;
  using Rows = QueryBlock<Config::kBlockM>;
  using RowTile = typename Smem::RowTile;
  using Tiles = typename Smem::Tiles;
  using KeyTile = typename Tiles::Tile;
  static constexpr int kScores = Config::kBlockN / 2;  // of a lane, in a tile
  static constexpr int kGrads = kHeadDim / 2;

  const GradQueryParams& params;
  const AttentionProblem& problem;
  uint32_t s_smem;
  Tiles tiles;
  ItemSlots<1> slot;

  __device__ __forceinline__ explicit GradQueryBlock(const GradQueryParams& params_)
      : params(params_),
        problem(params_.pass.problem),
        s_smem(ptx::shared_address(dynamic_smem())),
        tiles(dynamic_smem() + Smem::kTiles),
        slot(dynamic_smem() + Smem::kItem) {}

  __device__ __forceinline__ void init_barriers() const {
    tiles.init();
    slot.init(Config::kConsumers * kWarpgroupWarps);
    ptx::fence_mbarrier_init();
  }

  // The producer warp.
  __device__ __forceinline__ void produce() const {
    ItemSlots<1>::Position item;
    typename Tiles::Position position;
    for_each_taken_item(params.queue, [&](BlockAt block) {
      const Rows rows(problem, block);
      if (lane_id() == 0) {
        const uint32_t rows_full = slot.fill(item, block, 2 * RowTile::kBytes);
        RowTile::load(s_smem + Smem::kQuery, &params.query, rows_full, rows.row_begin, rows.head, rows.batch);
        RowTile::load(s_smem + Smem::kGradOut, &params.grad_out, rows_full, rows.row_begin, rows.head, rows.batch);
      }
      item.advance();
      for_each_live_key_tile<Config::kConsumers>(
          params.pass.block_mask + rows.mask_row(problem, rows.row_begin), rows.num_row_groups(),
          rows.mask_shape.key_words(), rows.num_key_tiles(), [&](int tile, uint32_t live) {
            tiles.load_keys_and_values(position, tile, live, &params.key, &params.value, rows.kv_head, rows.batch,
                                       rows.range);
            position.advance();
          });
      tiles.close(position);
      position.advance();
    });
    if (lane_id() == 0) slot.close(item);
  }

  // A consumer warpgroup.
  __device__ __forceinline__ void consume(int consumer) const {
    ItemSlots<1>::Position item;
    typename Tiles::Position position;
    for (BlockAt block; (block = slot.wait(item)).x != slot.kNone; item.advance()) {
      consume(consumer, Rows(problem, block), item, position);
    }
    if (lane_id() == 0) ptx::tma_store_wait_read<0>();
  }

  // A consumer's part of an item.
  __device__ __forceinline__ void consume(int consumer, const Rows& block, const ItemSlots<1>::Position& item,
                                          typename Tiles::Position& position) const {
    const WorkRange& range = block.range;
    const int batch = block.batch, head = block.head, row_begin = block.row_begin;
    const int warp = warp_id() % kWarpgroupWarps, lane = lane_id();
    const int tile_row = consumer * kRowsPerConsumer, warp_row = row_begin + tile_row + warp * kMaskRows;
    const int unmasked_end = range.num_visible_keys(max(warp_row, range.first_row_of(0)));
    const float alpha = head_alpha(problem, batch, head), to_z = score_to_z(problem, alpha);
    const Entmax<kKind> entmax{alpha};
    float tau[2], delta[2];
    int visible[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + accumulator_row(lane, half);
      const int64_t index = row_index(problem, batch, head, row);
      tau[half] = row < range.num_queries ? params.pass.tau[index] : INFINITY;
      delta[half] = row < range.num_queries ? params.pass.delta[index] : 0.0f;
      visible[half] = range.num_visible_keys(row);
    }

    // Phase 1: what stays for the whole item.
    const LeftOperand<RowTile, Config::kQueryInRegisters> query(s_smem + Smem::kQuery, tile_row);
    const LeftOperand<RowTile, Config::kGradOutInRegisters> grad_out(s_smem + Smem::kGradOut, tile_row);
    constexpr bool kRowsInRegisters = Config::kQueryInRegisters && Config::kGradOutInRegisters;
    if constexpr (kRowsInRegisters) slot.release(item);

    // Phase 2: the live tiles. Scores and dP of a tile are computed while dS K of the one before it is still added.
    float score[kScores], grad_prob[kScores], grad_query[kGrads];
    uint32_t grad_score[kScores / 8][4];
#pragma unroll
    for (int i = 0; i < kGrads; ++i) grad_query[i] = 0.0f;

    const auto start_scores = [&](int stage) {
      ptx::wgmma_pin(score);
      ptx::wgmma_pin(grad_prob);
      start_product_transposed<Element, KeyTile>(score, query, tiles.s_key(stage));
      start_product_transposed<Element, KeyTile>(grad_prob, grad_out, tiles.s_value(stage));
      ptx::wgmma_commit();
    };
    const auto start_sums = [&](int stage) {
      ptx::wgmma_pin(grad_query);
#pragma unroll
      for (int k = 0; k < kScores / 8; ++k) {
        ptx::wgmma_rs<Element, ptx::Major::kMn>(grad_query, grad_score[k], KeyTile::mn_major(tiles.s_key(stage), k),
                                                true);
      }
      ptx::wgmma_commit();
    };
    // Scores into dS, in place.
    const auto make_grad_scores = [&](int tile) {
      const int key_begin = tile * Config::kBlockN;
      if (key_begin + Config::kBlockN > unmasked_end) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          const int key = key_begin + i / 4 * 8 + accumulator_col(lane, i % 2);
          if (key >= visible[i / 2 % 2]) score[i] = -INFINITY;
        }
      }
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int half = i / 2 % 2;
        const float gap = fmaxf(score[i] * to_z - tau[half], 0.0f);
        score[i] = entmax.weight(gap) * (grad_prob[i] - delta[half]);
      }
      ptx::wgmma_pin(score);  // NOTE: or ptxas puts this behind the next wait, where no products of this warpgroup run
    };
    const auto make_operands = [&] {
#pragma unroll
      for (int k = 0; k < kScores / 8; ++k) accumulator_to_a<Element>(grad_score[k], score, k);
    };

    int stage;
    for (int tile = tiles.next(position, consumer, stage); tile >= 0;) {
      ptx::wgmma_fence();
      start_scores(stage);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(score);
      ptx::wgmma_pin(grad_prob);
      make_grad_scores(tile);
      make_operands();
      for (int next_stage; (tile = tiles.next(position, consumer, next_stage, stage)) >= 0; stage = next_stage) {
        ptx::wgmma_fence();
        start_scores(next_stage);
        start_sums(stage);
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(score);
        ptx::wgmma_pin(grad_prob);
        make_grad_scores(tile);
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(grad_query);
        tiles.release(stage);
        make_operands();
      }
      ptx::wgmma_fence();
      start_sums(stage);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(grad_query);
      tiles.release(stage);
      if (tile == Tiles::kBlocked) tile = tiles.next(position, consumer, stage);
    }

    if constexpr (!kRowsInRegisters) slot.release(item);

    // Phase 3: store, once the results of the item before have left. A row whose tau is NaN has no gradient either.
    const float scale = static_cast<float>(problem.scale);
#pragma unroll
    for (int i = 0; i < kGrads; ++i) {
      const float sum = tau[i / 2 % 2] < INFINITY ? grad_query[i] : 0.0f;
      grad_query[i] = std::isnan(tau[i / 2 % 2]) ? NAN : sum * scale;
    }
    if (lane == 0) ptx::tma_store_wait_read<0>();
    __syncwarp();
    store_warp_rows<Element, RowTile>(&params.grad_query, s_smem + Smem::kGradQuery, tile_row + warp * kMaskRows,
                                      grad_query, warp_row, head, batch);
  }
};

template <typename Element, int kHeadDim, AlphaKind kKind>
__global__ void __launch_bounds__(GradQueryConfig<kHeadDim>::kThreads, 1)
    grad_query_kernel(const __grid_constant__ GradQueryParams params) {
  const GradQueryBlock<Element, kHeadDim, kKind> block(params);
  if (threadIdx.x == 0) block.init_barriers();
  __syncthreads();
  if (warpgroup_id() == 0) {
    ptx::setmaxnreg_decrease<kProducerRegisters>();
    if (warp_id() == 0) block.produce();
  } else {
    ptx::setmaxnreg_increase<kConsumerRegisters>();
    block.consume(warpgroup_id() - 1);
  }
}

}  // namespace adasplash2::cuda::sm90
