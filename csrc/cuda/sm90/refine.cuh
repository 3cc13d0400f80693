// Between pass A and pass B on Hopper: exact row sums over the live tiles take coarse rows from near tau_lower to tau,
// or so close to it that pass B's last step does the rest (docs/algorithm.md, section 4).
//
//   in   query, key; tau_lower, is_coarse and the mask, as the scan left them
//   out  tau (B, H, Nq) float: where pass B takes its sums
//
// Grid (blocks of kBlockM rows, H, B), under is_causal those with most work first. A producer warp brings the live key
// tiles; each consumer warpgroup owns 64 rows.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <dynamic_smem.cuh>
#include <tensor_map.cuh>

#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/sm90/config.h"
#include "cuda/sm90/consumer_rows.cuh"
#include "cuda/sm90/live_key_tiles.cuh"
#include "cuda/sm90/query_block.cuh"
#include "cuda/sm90/tensor_maps.cuh"
#include "cuda/sm90/warpgroup.cuh"
#include "math/refinement.h"

namespace adasplash2::cuda::sm90 {

struct RefineParams {
  AttentionProblem problem;
  const float* tau_lower;
  const uint8_t* is_coarse;
  const uint32_t* scan_mask;
  const BlockAt* order;  // nullable: as the blocks of the grid
  float* tau;
  TensorMap query;  // boxes of kRowsPerConsumer rows
  TensorMap key;    // boxes of kBlockN rows
};

// Shared memory: queries | stages, barriers and entries of the ring | votes | voted | query_full
template <int kHeadDim>
struct RefineSmem {
  using Config = RefineConfig<kHeadDim>;
  using QueryTile = SmemTile<kRowsPerConsumer, kHeadDim>;
  using Tiles = LiveTileRing<Config::kStages, Config::kConsumers, kHeadDim, StageTiles::kKeys>;
  static constexpr int kConsumerWarps = Config::kConsumers * kWarpgroupWarps;

  static constexpr int kQuery = 0;  // a tile each consumer
  static constexpr int kTiles = kQuery + Config::kConsumers * QueryTile::kBytes;
  static constexpr int kVotes = kTiles + Tiles::kSmemBytes;  // int [2][kConsumerWarps]: wants another pass
  static constexpr int kVoted = kVotes + 2 * kConsumerWarps * 4;
  static constexpr int kQueryFull = kVoted + 8;
  static constexpr int kBytes = kQueryFull + 8;
  static_assert(kVoted % 8 == 0, "mbarriers are 8-byte aligned");
  static_assert(Config::kBlocksPerSm * (kBytes + 1024) <= kSmemPerSm, "more shared memory than an SM has");
};

template <typename Element, int kHeadDim, AlphaKind kKind>
struct RefineBlock : QueryBlock<RefineConfig<kHeadDim>::kBlockM> {
  using Config = RefineConfig<kHeadDim>;
  using Smem = RefineSmem<kHeadDim>;
  using Rows = QueryBlock<Config::kBlockM>;
  using QueryTile = typename Smem::QueryTile;
  using Tiles = typename Smem::Tiles;
  using Rows::batch, Rows::head, Rows::kv_head, Rows::range, Rows::row_begin;

  const RefineParams& params;
  const AttentionProblem& problem;
  uint8_t* smem;
  uint32_t s_smem;
  Tiles tiles;

  static __device__ __forceinline__ BlockAt block_here(const RefineParams& params) {
    if (params.order != nullptr) {
      const uint3 block = block_at(params.order);
      return {block.x, block.y | block.z << 16};
    }
    // Under is_causal the last blocks are the longest.
    const uint32_t x = params.problem.is_causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return {x, blockIdx.y | blockIdx.z << 16};
  }

  __device__ __forceinline__ explicit RefineBlock(const RefineParams& params_)
      : Rows(params_.problem, block_here(params_)),
        params(params_),
        problem(params_.problem),
        smem(dynamic_smem()),
        s_smem(ptx::shared_address(smem)),
        tiles(smem + Smem::kTiles) {}

  __device__ __forceinline__ int* s_votes(int pass) const {
    return reinterpret_cast<int*>(smem + Smem::kVotes) + pass % 2 * Smem::kConsumerWarps;
  }

  // Is a row of [begin, begin + num_rows) coarse? All lanes of a warp.
  __device__ __forceinline__ bool is_coarse(int begin, int num_rows) const {
    const uint8_t* g_is_coarse = params.is_coarse + row_index(problem, batch, head, 0);
    bool found = false;
    for (int row = begin + lane_id(); row < min(begin + num_rows, range.num_queries); row += kWarpSize) {
      found |= g_is_coarse[row] != 0;
    }
    return __any_sync(kAllLanes, found);
  }

  // After a pass, the consumers and the producer warp: does any warp want another?
  __device__ __forceinline__ bool any_goes_on(int pass) const {
    __syncwarp();
    if (lane_id() == 0) ptx::mbarrier_arrive(s_smem + Smem::kVoted);
    ptx::mbarrier_wait(s_smem + Smem::kVoted, pass % 2);
    int any = 0;
    for (int warp = 0; warp < Smem::kConsumerWarps; ++warp) any |= s_votes(pass)[warp];
    return any != 0;
  }

  // Of a block without coarse rows: tau_lower it is.
  __device__ __forceinline__ void copy() const {
    const int64_t head_row = row_index(problem, batch, head, 0);
    const int row = row_begin + threadIdx.x;
    if (threadIdx.x < Config::kBlockM && row < range.num_queries) {
      params.tau[head_row + row] = params.tau_lower[head_row + row];
    }
  }

  __device__ __forceinline__ void init_barriers() const {
    tiles.init();
    ptx::mbarrier_init(s_smem + Smem::kVoted, 1 + Smem::kConsumerWarps);
    ptx::mbarrier_init(s_smem + Smem::kQueryFull, 1);
    ptx::fence_mbarrier_init();
  }

  // The producer warp.
  __device__ __forceinline__ void produce() const {
    if (lane_id() == 0) {
      const uint32_t query_full = s_smem + Smem::kQueryFull;
      ptx::mbarrier_arrive_expect_tx(query_full, Config::kConsumers * QueryTile::kBytes);
      for (int i = 0; i < Config::kConsumers; ++i) {
        QueryTile::load(s_smem + Smem::kQuery + i * QueryTile::kBytes, &params.query, query_full,
                        row_begin + i * kRowsPerConsumer, head, batch);
      }
    }
    const uint32_t* g_mask = params.scan_mask + Rows::mask_row(problem, row_begin);
    typename Tiles::Position position;
    bool goes_on = true;
    for (int pass = 0; goes_on && pass < kMaxRefinements; ++pass) {
      for_each_live_key_tile<Config::kConsumers>(g_mask, Rows::num_row_groups(), Rows::mask_shape.key_words(),
                                                 Rows::num_key_tiles(), [&](int tile, uint32_t live) {
                                                   tiles.load_keys(position, tile, live, &params.key, kv_head, batch);
                                                   position.advance();
                                                 });
      tiles.close(position);
      position.advance();
      goes_on = any_goes_on(pass);
    }
  }

  // A consumer warpgroup.
  __device__ __forceinline__ void consume(int consumer) const {
    const int warp = warp_id() % kWarpgroupWarps, lane = lane_id();
    const int consumer_row = row_begin + consumer * kRowsPerConsumer, warp_row = consumer_row + warp * kMaskRows;
    const int unmasked_end = range.num_visible_keys(max(warp_row, range.first_row_of(0)));
    const int64_t head_row = row_index(problem, batch, head, 0);
    const float alpha = head_alpha(problem, batch, head), to_z = score_to_z(problem, alpha);
    const Entmax<kKind> entmax{alpha};
    ConsumerRows<kKind> rows;
    rows.init(range, warp_row, params.tau_lower + head_row);
    if constexpr (kKind == AlphaKind::kOneAndHalf) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + accumulator_row(lane, half);
        if (row < range.num_queries) rows.tau[half] += params.is_coarse[head_row + row] * kStartUnit;
      }
    }

    ptx::mbarrier_wait(s_smem + Smem::kQueryFull, 0);
    const LeftOperand<QueryTile, true> query(s_smem + Smem::kQuery + consumer * QueryTile::kBytes, 0);

    typename Tiles::Position position;
    bool goes_on = true, is_refined = is_coarse(consumer_row, kRowsPerConsumer);
    for (int pass = 0; goes_on && pass < kMaxRefinements; ++pass) {
      rows.clear_sums();
      int stage;
      for (int tile = tiles.next(position, consumer, stage); tile >= 0;) {
        float score[Config::kBlockN / 2];
        if (is_refined) {
          ptx::wgmma_pin(score);
          ptx::wgmma_fence();
          start_product_transposed<Element, typename Tiles::Tile>(score, query, tiles.s_key(stage));
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::wgmma_pin(score);
        }
        tiles.release(stage);
        if (is_refined) {
          const int key_begin = tile * Config::kBlockN;
          if (key_begin + Config::kBlockN > unmasked_end) rows.mask_edge(score, key_begin);
          if (rows.scores_to_counted_gaps(score, to_z)) rows.add_sums(score, entmax);
        }
        tile = tiles.next(position, consumer, stage);
      }
      bool is_rough = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowSums total = rows.total(half);
        if (is_refined) is_rough |= refine(entmax, total, rows.tau[half], kLargestTauError<Element>);
      }
      is_rough = __any_sync(kAllLanes, is_rough);
      if (lane == 0) s_votes(pass)[consumer * kWarpgroupWarps + warp] = is_rough;
      goes_on = any_goes_on(pass);
      is_refined = false;
      for (int other = 0; other < kWarpgroupWarps; ++other) {
        is_refined |= s_votes(pass)[consumer * kWarpgroupWarps + other] != 0;
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + accumulator_row(lane, half);
      if (lane % 4 == 0 && row < range.num_queries) params.tau[head_row + row] = rows.tau[half];
    }
  }
};

template <typename Element, int kHeadDim, AlphaKind kKind>
__global__ void __launch_bounds__(RefineConfig<kHeadDim>::kThreads, RefineConfig<kHeadDim>::kBlocksPerSm)
    refine_kernel(const __grid_constant__ RefineParams params) {
  using Config = RefineConfig<kHeadDim>;
  const RefineBlock<Element, kHeadDim, kKind> block(params);
  if (!block.is_coarse(block.row_begin, Config::kBlockM)) return block.copy();  // the same in all warps
  if (threadIdx.x == 0) block.init_barriers();
  __syncthreads();
  if (warpgroup_id() == 0) {
    ptx::setmaxnreg_decrease<Config::kProducerRegisters>();
    if (warp_id() == 0) block.produce();
  } else {
    ptx::setmaxnreg_increase<Config::kConsumerRegisters>();
    block.consume(warpgroup_id() - 1);
  }
}

}  // namespace adasplash2::cuda::sm90
