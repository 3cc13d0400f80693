// Pass B, the output: live tiles only; the last step for tau is folded in (docs/algorithm.md, section 4).
//
//   in   query, key, value (B, Hkv, Nk, Dv); tau_lower, is_coarse and scan_mask as the scan left them
//   out  out (B, H, Nq, Dv)          = (A_p - d b A_w) / (f - d b g), to first order sum prob v at tau
//        gap_mean_v (B, H, Nq, Dv)   = A_w / g, taken at tau0
//        tau (B, H, Nq)              = tau0 + d
//        support_size (B, H, Nq)     = n, taken at tau0
//        block_mask                  = the tiles with a gap > 0 at tau0; as tau0 <= tau it covers the support at tau
//
// where A_p = sum gap^b v, A_w = sum gap^(b-1) v, f = sum gap^b, g = sum gap^(b-1), n = #{gap > 0}, all at tau0, and
// tau0 is tau_lower, refined first in the blocks where a row is coarse.
//
// Grid (blocks of kBlockM rows, H * chunks of value columns, B). A warp owns 16 rows and kWarpChunk of the columns.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <dynamic_smem.cuh>
#include <type_traits>

#include "cuda/config.h"
#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/live_tiles.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "cuda/tile/score_mask.cuh"
#include "cuda/tile/tile_copy.cuh"
#include "math/block_mask.h"
#include "math/entmax.h"
#include "math/refinement.h"

namespace adasplash2::cuda {

// The two rows of a lane.
struct RowPair {
  float tau[2];
  int visible[2];
};

// The row sums of a lane's two rows, over its columns.
struct LaneSums {
  RowSums sums[2];  // without the count
  int count[2] = {0, 0};
};

// Turns 16 x 8 kN scores into gaps at tau, in place, and counts them; a NaN score gives no gap. Returns whether a row
// of the warp has one.
template <int kN>
__device__ __forceinline__ bool scores_to_gaps(float (&score)[kN][4], const RowPair& rows, float to_z, int key_begin,
                                               bool is_edge, LaneSums& lane_sums) {
  const int lane = lane_id();
  int count[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float below = rows.tau[e / 2] - score[n][e] * to_z;
      if (is_edge && key_begin + n * kMmaN + accumulator_col(lane, e % 2) >= rows.visible[e / 2]) below = 0.0f;
      count[e / 2] += float_bits(below) >> 31;  // the sign: one instruction
      score[n][e] = fmaxf(-below, 0.0f);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) lane_sums.count[half] += count[half];
  return __any_sync(kAllLanes, (count[0] | count[1]) != 0);
}

__device__ __forceinline__ RowSums row_sums(const LaneSums& lane_sums, int half) {
  const RowSums& sums = lane_sums.sums[half];
  return {quad_sum(sums.prob), quad_sum(sums.weight), quad_sum(static_cast<float>(lane_sums.count[half]))};
}

// NOTE: masks have an instance of their own, as in the scan.
template <typename Element, int kHeadDim, AlphaKind kKind, bool kHasMask>
__global__ void __launch_bounds__(OutputConfig<kTileCols<Element, kHeadDim>>::kThreads, kMinBlocksPerSm)
    output_kernel(const OutputParams params) {
  constexpr int kCols = kTileCols<Element, kHeadDim>;
  using Config = OutputConfig<kCols>;
  using Fragments =
      std::conditional_t<Config::template kQueryInRegisters<kKind>, RowFragments<kCols>, RowFragmentsInSmem<kCols>>;
  constexpr int kValueChunk = kChunkOf<Element, Config::kValueChunk>;
  constexpr int kKeysPerStep = Config::template kKeysPerStep<kKind, kHasMask>;
  constexpr int kFragmentsN = kKeysPerStep / kMmaN;
  constexpr int kWarpChunk = kChunkOf<Element, Config::kWarpChunk>;
  constexpr int kFragmentsV = kWarpChunk / kMmaN;
  constexpr int kKeyStageBytes = Config::kBlockN * kCols * 2;
  constexpr int kValueStageBytes = Config::kBlockN * Config::kValueChunk * 2;

  const AttentionProblem& problem = params.problem;
  const int num_heads = static_cast<int>(problem.num_heads);
  const uint3 block = block_at(params.order);
  const int batch = block.z, head = block.y % num_heads, value_chunk = block.y / num_heads, m_block = block.x;
  const int kv_head = kv_head_of(head, problem.num_heads, problem.num_kv_heads);
  const int warp = warp_id(), lane = lane_id();
  const int warp_chunk = Config::kChunkWarps == 1 ? 0 : warp / Config::kRowWarps, warp_col = warp_chunk * kWarpChunk;
  const int row_warp = warp - warp_chunk * Config::kRowWarps;
  const int row_begin = m_block * Config::kBlockM, warp_row = row_begin + row_warp * kMaskRows;
  const int value_begin = value_chunk * kValueChunk;
  const bool is_first_chunk = value_chunk == 0 && warp_col == 0;  // its warp writes what a row has one of
  const int num_value_cols = min(static_cast<int>(problem.value_head_dim) - value_begin, kValueChunk);

  const WorkRange range = work_range(problem, batch);
  const int num_queries = range.num_queries, head_dim = static_cast<int>(problem.head_dim);
  const int key_end = range.max_visible_keys(row_begin, row_begin + Config::kBlockM);
  const int unmasked_end = range.num_visible_keys(max(warp_row, range.first_row_of(0)));
  const auto* g_query = head_rows<const Stored<Element>>(problem.query, batch, head);
  const auto* g_key = head_rows<const Stored<Element>>(problem.key, batch, kv_head);
  const auto* g_value = head_rows<const Stored<Element>>(problem.value, batch, kv_head) + value_begin;
  const int64_t head_row = row_index(problem, batch, head, 0);

  const BlockMaskShape mask_shape(num_queries, range.num_keys);
  const int group = warp_row / kMaskRows;
  const int64_t mask_offset = (batch * problem.num_heads + head) * mask_shape.row_words();
  const int first_group = row_begin / kMaskRows;
  const int num_groups = min(Config::kRowWarps, mask_shape.num_row_groups - first_group);
  const auto live_tiles = [&] {
    return LiveTiles(params.scan_mask + mask_offset + int64_t(first_group) * mask_shape.key_words(), num_groups,
                     mask_shape.key_words(), ceil_div(key_end, kMaskKeys));
  };

  // Shared memory: queries | key ring | value ring | one flag a warp.
  uint8_t* smem = dynamic_smem();
  const uint32_t s_query = ptx::shared_address(smem);
  const uint32_t s_key = s_query + Config::kQueryBytes;
  const uint32_t s_value = s_key + Config::kKeyBytes;
  int* s_flags = reinterpret_cast<int*>(smem + Config::kQueryBytes + Config::kKeyBytes + Config::kValueBytes);

  const auto copy_keys = [&](int key_begin, int stage) {
    copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(s_key + stage * kKeyStageBytes, g_key,
                                                              problem.key.stride_row, key_begin, key_end, head_dim);
  };
  const auto copy_values = [&](int key_begin, int stage) {
    copy_tile_async<Config::kBlockN, Config::kValueChunk, Config::kThreads>(
        s_value + stage * kValueStageBytes, g_value, problem.value.stride_row, key_begin, key_end, num_value_cols);
  };

  // Phase 1: the queries and what the scan found.
  copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(s_query, g_query, problem.query.stride_row, row_begin,
                                                            num_queries, head_dim);
  ptx::cp_async_commit();
  const float alpha = head_alpha(problem, batch, head), to_z = score_to_z(problem, alpha);
  const EntmaxOf<Element, kKind> entmax{alpha};
  RowPair rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + accumulator_row(lane, half);
    rows.visible[half] = range.num_visible_keys(row);
    rows.tau[half] = row < num_queries ? params.tau_lower[head_row + row] : INFINITY;
  }
  bool is_coarse = std::is_same_v<Element, float>;  // a result in float always takes a tau that is right to rounding
  for (int row = row_begin + lane; row < min(row_begin + Config::kBlockM, num_queries); row += kWarpSize) {
    is_coarse |= params.is_coarse[head_row + row] != 0;
  }
  is_coarse = __any_sync(kAllLanes, is_coarse);  // every warp looks at all rows of the block: no barrier needed

  ptx::cp_async_wait<0>();
  __syncthreads();
  Fragments query;
  query.load(s_query, row_warp * kMmaM);

  const auto for_each_live_part = [&](const auto& copy, const auto& body) {
    for_each_part<Config::kStages>(LiveParts<Config::kBlockN>(live_tiles()), copy, body);
    __syncthreads();  // the stages are free again
  };

  const auto compute_gaps = [&](float (&gap)[kFragmentsN][4], int part_begin, int stage, int first_key,
                                LaneSums& sums) {
    const int key_begin = part_begin + first_key;
    const auto multiply = [&] {
      multiply_transposed<Element, kCols>(gap, query, s_key + stage * kKeyStageBytes + first_key * kCols * 2);
    };
    if constexpr (kHasMask) {
      ScoreMask<Element>(problem.mask, batch, head, score_scale(problem))
          .multiply_masked(
              gap, warp_row, key_begin,
              [&](int half) { return range.num_visible_keys(warp_row + accumulator_row(lane, half)); }, multiply);
    } else {
      multiply();
    }
    return scores_to_gaps(gap, rows, to_z, key_begin, key_begin + kKeysPerStep > unmasked_end, sums);
  };

  // Phase 2, only where the scan flagged a row: exact row sums move every tau0 of the block up, never past tau.
  for (int pass = 0; is_coarse && pass < kMaxRefinements; ++pass) {
    LaneSums sums;
    for_each_live_part(copy_keys, [&](int key_begin, int stage) {
#pragma unroll 1
      for (int first_key = 0; first_key < Config::kBlockN; first_key += kKeysPerStep) {
        float gap[kFragmentsN][4];
        if (!compute_gaps(gap, key_begin, stage, first_key, sums)) continue;
#pragma unroll
        for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float weight = entmax.weight(gap[n][e]);
            sums.sums[e / 2].prob += entmax.prob(gap[n][e], weight);
            sums.sums[e / 2].weight += weight;
          }
        }
      }
    });
    bool goes_on = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      goes_on |= refine(entmax, row_sums(sums, half), rows.tau[half], kLargestTauError<Element>);
    }
    goes_on = __any_sync(kAllLanes, goes_on);
    if (lane == 0) s_flags[warp] = goes_on;
    __syncthreads();
    is_coarse = false;
    for (int other = 0; other < Config::kWarps; ++other) is_coarse |= s_flags[other] != 0;
    __syncthreads();
  }

  // Phase 3: the sums over the live tiles, and which of them are live at tau0.
  uint32_t* g_mask = params.block_mask + mask_offset + int64_t(group) * mask_shape.key_words();
  const bool writes_mask = lane == 0 && is_first_chunk && group < mask_shape.num_row_groups;
  uint32_t mask_bits = 0;
  int word = 0;
  const auto finish_words_before = [&](int end) {
    for (; word < end; ++word) {
      if (writes_mask) g_mask[word] = mask_bits;
      mask_bits = 0;
    }
  };

  float sum_prob_v[kFragmentsV][4], sum_weight_v[kFragmentsV][4];
  clear(sum_prob_v);
  clear(sum_weight_v);
  LaneSums sums;
  const auto copy_keys_and_values = [&](int key_begin, int stage) {
    copy_keys(key_begin, stage);
    copy_values(key_begin, stage);
  };
  for_each_live_part(copy_keys_and_values, [&](int key_begin, int stage) {
    const int tile = key_begin / kMaskKeys;
    finish_words_before(mask_word(tile));
#pragma unroll 1
    for (int first_key = 0; first_key < Config::kBlockN; first_key += kKeysPerStep) {
      float gap[kFragmentsN][4];
      if (!compute_gaps(gap, key_begin, stage, first_key, sums)) continue;
      mask_bits |= mask_bit(tile);
      const uint32_t s_tile = s_value + stage * kValueStageBytes + first_key * Config::kValueChunk * 2;
#pragma unroll
      for (int k = 0; k < kFragmentsN; k += 2) {
        float weight[2][4], prob[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            weight[i][e] = entmax.weight(gap[k + i][e]);
            prob[i][e] = entmax.prob(gap[k + i][e], weight[i][e]);
            sums.sums[e / 2].prob += prob[i][e];
            sums.sums[e / 2].weight += weight[i][e];
          }
        }
        multiply_add_both<Element, Config::kValueChunk>(
            sum_prob_v, operand_of_accumulators<Element>(prob[0], prob[1]), sum_weight_v,
            operand_of_accumulators<Element>(weight[0], weight[1]), s_tile, k * kMmaN, warp_col);
      }
    }
  });
  finish_words_before(mask_shape.key_words());

  // Phase 4: the last step for tau, and its fold into the output.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowSums total = row_sums(sums, half);
    const OutputFold fold = output_fold(entmax, total, rows.tau[half]);
#pragma unroll
    for (int n = 0; n < kFragmentsV; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        sum_prob_v[n][e] = (sum_prob_v[n][e] - fold.shift * sum_weight_v[n][e]) * fold.prob_scale;
        sum_weight_v[n][e] *= fold.weight_scale;
      }
    }
    const int row = warp_row + accumulator_row(lane, half);
    if (lane % 4 == 0 && is_first_chunk && row < num_queries) {
      const int64_t index = row_index(problem, batch, head, row);
      params.tau[index] = rows.tau[half] + fold.step;
      if (params.support_size != nullptr) params.support_size[index] = static_cast<int32_t>(total.count);
    }
  }

  // Phase 5: store.
  const auto store = [&](const Rows& rows_of, const float (&acc)[kFragmentsV][4]) {
    const int first_col = value_begin + warp_col;
    Element* g_rows = head_rows<Element>(rows_of, batch, head) + warp_row * rows_of.stride_row + first_col;
    store_rows(g_rows, rows_of.stride_row, acc, num_queries - warp_row, num_value_cols - warp_col);
  };
  store(params.out, sum_prob_v);
  if (params.gap_mean_v.data != nullptr) store(params.gap_mean_v, sum_weight_v);
}

}  // namespace adasplash2::cuda
