// Pass B, the output, on Hopper: outputs and mathematics are those of sm80/output.cuh (docs/kernels.md, "sm90"). tau is
// read too: the sums are taken where refine.cuh has brought it. Where alpha = 1.5 that is tau to the rounding of 16
// bits; if neither gap_mean_v nor support_size is wanted, it is left at that, and the values are added up with prob
// alone.
//
// Blocks stay, and take blocks of kBlockM rows of a head one after the other (work_queue.cuh). A producer warp brings
// their queries and live key tiles, K and V, by TMA; each consumer warpgroup owns 64 rows, a warp 16 of them.
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
#include "cuda/sm90/consumer_rows.cuh"
#include "cuda/sm90/live_key_tiles.cuh"
#include "cuda/sm90/query_block.cuh"
#include "cuda/sm90/tensor_maps.cuh"
#include "cuda/sm90/warpgroup.cuh"
#include "cuda/sm90/work_queue.cuh"
#include "math/refinement.h"

namespace adasplash2::cuda::sm90 {

struct OutputParams {
  cuda::OutputParams pass;
  WorkQueue queue;
  TensorMap query;            // boxes of kBlockM rows
  TensorMap key, value;       // boxes of kBlockN rows
  TensorMap out, gap_mean_v;  // boxes of 16 rows; gap_mean_v unset where it is not wanted
};

template <int kHeadDim>
OutputParams with_tensor_maps(const cuda::OutputParams& pass, const WorkQueue& queue) {
  using Config = OutputConfig<kHeadDim>;
  const AttentionProblem& problem = pass.problem;
  const int64_t value_dim = problem.value_head_dim;
  return {
      pass,
      queue,
      query_rows_map(problem, problem.query, problem.head_dim, Config::kBlockM),
      key_rows_map(problem, problem.key, problem.head_dim, Config::kBlockN),
      key_rows_map(problem, problem.value, value_dim, Config::kBlockN),
      query_rows_map(problem, pass.out, value_dim, kMaskRows),
      pass.gap_mean_v.data == nullptr ? TensorMap{} : query_rows_map(problem, pass.gap_mean_v, value_dim, kMaskRows)};
}

// Shared memory: queries | out and gap_mean_v on their way out | stages, barriers and entries of the ring | item
template <int kHeadDim>
struct OutputSmem {
  using Config = OutputConfig<kHeadDim>;
  using QueryTile = SmemTile<Config::kBlockM, kHeadDim>;
  using Tiles = LiveTileRing<Config::kStages, Config::kConsumers, kHeadDim>;

  static constexpr int kQuery = 0;
  static constexpr int kOut = kQuery + QueryTile::kBytes;
  static constexpr int kGapMeanV = kOut + QueryTile::kBytes;
  static constexpr int kTiles = kGapMeanV + QueryTile::kBytes;
  static constexpr int kItem = kTiles + Tiles::kSmemBytes;
  static constexpr int kBytes = kItem + ItemSlots<1>::kSmemBytes;
  static_assert(kItem % 8 == 0, "mbarriers are 8-byte aligned");
  static_assert(kBytes <= kSmemPerBlock, "more shared memory than a block can have");
};

template <typename Element, int kHeadDim, AlphaKind kKind, bool kHasWeights>
struct OutputBlock {
  using Config = OutputConfig<kHeadDim>;
  using Smem = OutputSmem<kHeadDim>;
  using Rows = QueryBlock<Config::kBlockM>;
  using QueryTile = typename Smem::QueryTile;
  using Tiles = typename Smem::Tiles;
  using KeyTile = typename Tiles::Tile;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kScores = Config::kBlockN / 2;  // of a lane, in a tile
  static constexpr int kSums = kHeadDim / 2;
  static_assert(kHasWeights || kKind == AlphaKind::kOneAndHalf, "the last step takes A_w");
  // Beside the products of the tile before, where weights cost little enough to be computed twice.
  static constexpr bool kSumsBesideProducts = kKind != AlphaKind::kGeneral;

  const OutputParams& params;
  const AttentionProblem& problem;
  uint8_t* smem;
  uint32_t s_smem;
  Tiles tiles;
  ItemSlots<1> slot;

  __device__ __forceinline__ explicit OutputBlock(const OutputParams& params_)
      : params(params_),
        problem(params_.pass.problem),
        smem(dynamic_smem()),
        s_smem(ptx::shared_address(smem)),
        tiles(smem + Smem::kTiles),
        slot(smem + Smem::kItem) {}

  __device__ __forceinline__ void init_barriers() const {
    tiles.init();
    slot.init(kConsumers * kWarpgroupWarps);
    ptx::fence_mbarrier_init();
  }

  // The producer warp.
  __device__ __forceinline__ void produce() const {
    ItemSlots<1>::Position item;
    typename Tiles::Position position;
    for_each_taken_item(params.queue, [&](BlockAt block) {
      const Rows rows(problem, block);
      if (lane_id() == 0) {
        const uint32_t query_full = slot.fill(item, block, QueryTile::kBytes);
        QueryTile::load(s_smem + Smem::kQuery, &params.query, query_full, rows.row_begin, rows.head, rows.batch);
      }
      item.advance();
      for_each_live_key_tile<kConsumers>(params.pass.scan_mask + rows.mask_row(problem, rows.row_begin),
                                         rows.num_row_groups(), rows.mask_shape.key_words(), rows.num_key_tiles(),
                                         [&](int tile, uint32_t live) {
                                           tiles.load_keys_and_values(position, tile, live, &params.key, &params.value,
                                                                      rows.kv_head, rows.batch, rows.range);
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
    const int consumer_row = row_begin + consumer * kRowsPerConsumer, warp_row = consumer_row + warp * kMaskRows;
    const int block_warp = consumer * kWarpgroupWarps + warp;
    const int num_queries = range.num_queries;
    const int unmasked_end = range.num_visible_keys(max(warp_row, range.first_row_of(0)));
    const int64_t head_row = row_index(problem, batch, head, 0);
    const float alpha = head_alpha(problem, batch, head), to_z = score_to_z(problem, alpha);
    const Entmax<kKind> entmax{alpha};
    ConsumerRows<kKind> rows;
    rows.init(range, warp_row, params.pass.tau + head_row);

    // Phase 1: the queries.
    const LeftOperand<QueryTile, Config::kQueryInRegisters> query(s_smem + Smem::kQuery, consumer * kRowsPerConsumer);
    if constexpr (Config::kQueryInRegisters) slot.release(item);

    float score[kScores];
    const auto start_scores = [&](int stage) {
      ptx::wgmma_pin(score);
      start_product_transposed<Element, KeyTile>(score, query, tiles.s_key(stage));
      ptx::wgmma_commit();
    };

    // Phase 2: the sums over the live tiles, and which of them are live at tau. The scores of a tile are computed
    // while the values of the one before it are still being added.
    uint32_t* g_mask = params.pass.block_mask + block.mask_row(problem, warp_row);
    const bool writes_mask = lane == 0 && warp_row < num_queries;
    uint32_t mask_bits = 0;
    int word = 0;
    const auto finish_words_before = [&](int end) {
      for (; word < end; ++word) {
        if (writes_mask) g_mask[word] = mask_bits;
        mask_bits = 0;
      }
    };
    const bool counts = params.pass.support_size != nullptr;
    // Without weights, gaps become probs at once.
    const auto make_gaps_and_mask = [&](int tile) {
      finish_words_before(mask_word(tile));
      const int key_begin = tile * Config::kBlockN;
      if (key_begin + Config::kBlockN > unmasked_end) rows.mask_edge(score, key_begin);
      bool is_live;
      if constexpr (!kSumsBesideProducts) {
        is_live = rows.scores_to_counted_gaps(score, to_z);
      } else {
        rows.scores_to_gaps(score, to_z);
        if constexpr (kHasWeights) {
          if (counts) rows.count_gaps(score);
          is_live = rows.add_sums(score, entmax);
        } else {
          is_live = rows.gaps_to_probs(score, entmax);
        }
        is_live = __any_sync(kAllLanes, is_live);
      }
      if (is_live) mask_bits |= mask_bit(tile);
      // NOTE: or ptxas puts most of this behind the next wait, where no products of this warpgroup run.
      ptx::wgmma_pin(score);
      ptx::wgmma_pin(rows.prob_sum);
      ptx::wgmma_pin(rows.weight_sum);
    };

    float sum_prob_v[kSums], sum_weight_v[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum_prob_v[i] = sum_weight_v[i] = 0.0f;
    const auto pin_sums = [&] {
      ptx::wgmma_pin(sum_prob_v);
      if constexpr (kHasWeights) ptx::wgmma_pin(sum_weight_v);
    };
    rows.clear_sums();
    uint32_t prob[kScores / 8][4], weight[kScores / 8][4];
    const auto make_operands = [&] {
#pragma unroll
      for (int k = 0; k < kScores / 8; ++k) {
        if constexpr (!kHasWeights) {
          accumulator_to_a<Element>(prob[k], score, k);
        } else {
          float probs[8], weights[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            weights[i] = entmax.weight(score[8 * k + i]);
            probs[i] = entmax.prob(score[8 * k + i], weights[i]);
            if constexpr (!kSumsBesideProducts) {
              rows.prob_sum[i / 2 % 2] += probs[i];
              rows.weight_sum[i / 2 % 2] += weights[i];
            }
          }
          accumulator_to_a<Element>(prob[k], probs, 0);
          accumulator_to_a<Element>(weight[k], weights, 0);
        }
      }
    };
    const auto start_sums = [&](int stage) {
      pin_sums();
#pragma unroll
      for (int k = 0; k < kScores / 8; ++k) {
        const uint64_t values = KeyTile::mn_major(tiles.s_value(stage), k);
        ptx::wgmma_rs<Element, ptx::Major::kMn>(sum_prob_v, prob[k], values, true);
        if constexpr (kHasWeights) ptx::wgmma_rs<Element, ptx::Major::kMn>(sum_weight_v, weight[k], values, true);
      }
      ptx::wgmma_commit();
    };

    int stage;
    for (int tile = tiles.next(position, consumer, stage); tile >= 0;) {
      ptx::wgmma_fence();
      start_scores(stage);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(score);
      make_gaps_and_mask(tile);
      make_operands();
      for (int next_stage; (tile = tiles.next(position, consumer, next_stage, stage)) >= 0; stage = next_stage) {
        ptx::wgmma_fence();
        start_scores(next_stage);
        start_sums(stage);
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(score);
        make_gaps_and_mask(tile);
        ptx::wgmma_wait<0>();
        pin_sums();
        tiles.release(stage);
        make_operands();
      }
      ptx::wgmma_fence();
      start_sums(stage);
      ptx::wgmma_wait<0>();
      pin_sums();
      tiles.release(stage);
      if (tile == Tiles::kBlocked) tile = tiles.next(position, consumer, stage);
    }
    if constexpr (!Config::kQueryInRegisters) slot.release(item);
    finish_words_before(block.mask_shape.key_words());

    // Phase 3: the last step for tau, and its fold into the output.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (!kHasWeights) {
        const float scale = output_scale(quad_sum(rows.prob_sum[half]), rows.tau[half]);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          if (i / 2 % 2 == half) sum_prob_v[i] *= scale;
        }
      } else {
        const RowSums total = rows.total(half);
        const OutputFold fold = output_fold(entmax, total, rows.tau[half]);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          if (i / 2 % 2 != half) continue;
          sum_prob_v[i] = (sum_prob_v[i] - fold.shift * sum_weight_v[i]) * fold.prob_scale;
          sum_weight_v[i] *= fold.weight_scale;
        }
        const int row = warp_row + accumulator_row(lane, half);
        if (lane % 4 == 0 && row < num_queries) {
          params.pass.tau[head_row + row] = rows.tau[half] + fold.step;
          if (counts) params.pass.support_size[head_row + row] = static_cast<int32_t>(total.count);
        }
      }
    }

    // Phase 4: store, once the results of the item before have left.
    if (lane == 0) ptx::tma_store_wait_read<0>();
    __syncwarp();
    store_warp_rows<Element, QueryTile>(&params.out, s_smem + Smem::kOut, block_warp * kMaskRows, sum_prob_v, warp_row,
                                        head, batch);
    if (params.pass.gap_mean_v.data != nullptr) {
      store_warp_rows<Element, QueryTile>(&params.gap_mean_v, s_smem + Smem::kGapMeanV, block_warp * kMaskRows,
                                          sum_weight_v, warp_row, head, batch);
    }
  }
};

template <typename Element, int kHeadDim, AlphaKind kKind, bool kHasWeights>
__global__ void __launch_bounds__(OutputConfig<kHeadDim>::kThreads, 1)
    output_kernel(const __grid_constant__ OutputParams params) {
  const OutputBlock<Element, kHeadDim, kKind, kHasWeights> block(params);
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
