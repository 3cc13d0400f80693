// Backward, dq, on Hopper: inputs, outputs and mathematics are those of sm80/grad_query.cuh (docs/kernels.md, "sm90").
//
// Grid (blocks of kBlockM rows, H, B). A producer warp brings the live key tiles, K and V, by TMA; each consumer
// warpgroup owns 64 rows, a warp 16 of them. Three products a tile: Q K^T, dO V^T, dS K.
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

namespace adasplash2::cuda::sm90 {

struct GradQueryParams {
  GradParams pass;
  TensorMap query, grad_out;  // boxes of kBlockM rows
  TensorMap key, value;       // boxes of kBlockN rows
  TensorMap grad_query;       // boxes of 16 rows
};

template <int kHeadDim>
GradQueryParams with_tensor_maps(const GradParams& pass) {
  using Config = GradQueryConfig<kHeadDim>;
  const AttentionProblem& problem = pass.problem;
  return {pass,
          query_rows_map(problem, problem.query, problem.head_dim, Config::kBlockM),
          query_rows_map(problem, pass.grad_out, problem.value_head_dim, Config::kBlockM),
          key_rows_map(problem, problem.key, problem.head_dim, Config::kBlockN),
          key_rows_map(problem, problem.value, problem.value_head_dim, Config::kBlockN),
          query_rows_map(problem, pass.grad_query, problem.head_dim, kMaskRows)};
}

// Shared memory: queries | grad_out | stages, barriers and entries of the ring | rows_full
template <int kHeadDim>
struct GradQuerySmem {
  using Config = GradQueryConfig<kHeadDim>;
  using RowTile = SmemTile<Config::kBlockM, kHeadDim>;
  using Tiles = LiveTileRing<Config::kStages, Config::kConsumers, kHeadDim>;

  static constexpr int kQuery = 0;  // each warp's 16 rows become its rows of grad_query
  static constexpr int kGradOut = kQuery + RowTile::kBytes;
  static constexpr int kTiles = kGradOut + RowTile::kBytes;
  static constexpr int kRowsFull = kTiles + Tiles::kSmemBytes;
  static constexpr int kBytes = kRowsFull + 8;
  static_assert(kRowsFull % 8 == 0, "mbarriers are 8-byte aligned");
  static_assert(kBytes <= kSmemPerBlock, "more shared memory than a block can have");
};

template <typename Element, int kHeadDim, AlphaKind kKind>
struct GradQueryBlock : QueryBlock<GradQueryConfig<kHeadDim>::kBlockM> {
  using Config = GradQueryConfig<kHeadDim>;
  using Smem = GradQuerySmem<kHeadDim>;
  using Rows = QueryBlock<Config::kBlockM>;
  using RowTile = typename Smem::RowTile;
  using Tiles = typename Smem::Tiles;
  using KeyTile = typename Tiles::Tile;
  using Rows::batch, Rows::head, Rows::kv_head, Rows::range, Rows::row_begin;
  static constexpr int kScores = Config::kBlockN / 2;  // of a lane, in a tile
  static constexpr int kGrads = kHeadDim / 2;

  const GradQueryParams& params;
  const AttentionProblem& problem;
  uint32_t s_smem;
  Tiles tiles;

  __device__ __forceinline__ explicit GradQueryBlock(const GradQueryParams& params_)
      : Rows(params_.pass.problem),
        params(params_),
        problem(params_.pass.problem),
        s_smem(ptx::shared_address(dynamic_smem())),
        tiles(dynamic_smem() + Smem::kTiles) {}

  __device__ __forceinline__ void init_barriers() const {
    tiles.init();
    ptx::mbarrier_init(s_smem + Smem::kRowsFull, 1);
    ptx::fence_mbarrier_init();
  }

  // The producer warp.
  __device__ __forceinline__ void produce() const {
    if (lane_id() == 0) {
      const uint32_t rows_full = s_smem + Smem::kRowsFull;
      ptx::mbarrier_arrive_expect_tx(rows_full, 2 * RowTile::kBytes);
      RowTile::load(s_smem + Smem::kQuery, &params.query, rows_full, row_begin, head, batch);
      RowTile::load(s_smem + Smem::kGradOut, &params.grad_out, rows_full, row_begin, head, batch);
    }
    typename Tiles::Position position;
    for_each_live_key_tile<Config::kConsumers>(
        params.pass.block_mask + Rows::mask_row(problem, row_begin), Rows::num_row_groups(),
        Rows::mask_shape.key_words(), Rows::num_key_tiles(), [&](int tile, uint32_t live) {
          tiles.load_keys_and_values(position, tile, live, &params.key, &params.value, kv_head, batch, range);
          position.advance();
        });
    tiles.close(position);
  }

  // A consumer warpgroup.
  __device__ __forceinline__ void consume(int consumer) const {
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

    // Phase 1: what stays for the whole block.
    ptx::mbarrier_wait(s_smem + Smem::kRowsFull, 0);
    const LeftOperand<RowTile, Config::kQueryInRegisters> query(s_smem + Smem::kQuery, tile_row);
    const LeftOperand<RowTile, Config::kGradOutInRegisters> grad_out(s_smem + Smem::kGradOut, tile_row);

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

    typename Tiles::Position position;
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

    // Phase 3: store; the queries are no longer needed. A row whose tau is NaN has no gradient either.
    const float scale = static_cast<float>(problem.scale);
#pragma unroll
    for (int i = 0; i < kGrads; ++i) {
      const float sum = tau[i / 2 % 2] < INFINITY ? grad_query[i] : 0.0f;
      grad_query[i] = std::isnan(tau[i / 2 % 2]) ? NAN : sum * scale;
    }
    store_warp_rows<Element, RowTile>(&params.grad_query, s_smem + Smem::kQuery, tile_row + warp * kMaskRows,
                                      grad_query, warp_row, head, batch);
    if (lane == 0) ptx::tma_store_wait_read<0>();
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
