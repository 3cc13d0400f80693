// Backward, dq: dS = weight (dP - delta) over the live tiles of a block of rows, dQ = sigma dS K
// (docs/algorithm.md, section 5).
//
//   in   query, key, value, grad_out (B, H, Nq, Dv), tau and block_mask of the forward pass, delta (B, H, Nq)
//   out  grad_query (B, H, Nq, D)
//
// Grid (blocks of kBlockM rows, H, B). A warp owns kRowsPerWarp rows and, of dS K alone, a chunk of the columns. Three
// products a tile: Q K^T, dO V^T, dS K.
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

namespace adasplash2::cuda {

// NOTE: masks have an instance of their own, as in the scan: at head dim 256 no register is free for them.
template <typename Element, int kHeadDim, AlphaKind kKind, bool kHasMask>
__global__ void __launch_bounds__(GradQueryConfig<kTileCols<Element, kHeadDim>, kHasMask>::kThreads,
                                  GradQueryConfig<kTileCols<Element, kHeadDim>, kHasMask>::kMinBlocks)
    grad_query_kernel(const GradParams params) {
  constexpr int kCols = kTileCols<Element, kHeadDim>;
  using Config = GradQueryConfig<kCols, kHasMask>;
  constexpr int kFragmentsM = Config::kRowsPerWarp / kMmaM;
  using QueryFragments = std::conditional_t<Config::kQueryInRegisters, RowFragments<kCols>, RowFragmentsInSmem<kCols>>;
  using GradOutFragments =
      std::conditional_t<Config::kGradOutInRegisters, RowFragments<kCols>, RowFragmentsInSmem<kCols>>;
  constexpr int kFragmentsN = Config::kKeysPerStep / kMmaN;
  constexpr int kWarpChunk = kHeadDim / Config::kChunkWarps;
  constexpr int kStageBytes = Config::kBlockN * kCols * 2;

  const AttentionProblem& problem = params.problem;
  const uint3 block = block_at(params.order);
  const int batch = block.z, head = block.y, m_block = block.x;
  const int kv_head = kv_head_of(head, problem.num_heads, problem.num_kv_heads);
  const int warp = warp_id(), lane = lane_id();
  const int warp_chunk = Config::kChunkWarps == 1 ? 0 : warp / Config::kRowWarps, first_col = warp_chunk * kWarpChunk;
  const int first_row = (warp - warp_chunk * Config::kRowWarps) * Config::kRowsPerWarp;  // of the block's
  const int row_begin = m_block * Config::kBlockM, warp_row = row_begin + first_row;

  const WorkRange range = work_range(problem, batch);
  const int num_queries = range.num_queries;
  const int head_dim = static_cast<int>(problem.head_dim), value_head_dim = static_cast<int>(problem.value_head_dim);
  const int key_end = range.max_visible_keys(row_begin, row_begin + Config::kBlockM);
  const int unmasked_end = range.num_visible_keys(max(warp_row, range.first_row_of(0)));
  const auto* g_key = head_rows<const Stored<Element>>(problem.key, batch, kv_head);
  const auto* g_value = head_rows<const Stored<Element>>(problem.value, batch, kv_head);

  // Shared memory: queries | grad_out | key ring | value ring.
  const uint32_t s_query = ptx::shared_address(dynamic_smem());
  const uint32_t s_grad_out = s_query + Config::kQueryBytes;
  const uint32_t s_key = s_grad_out + Config::kQueryBytes;
  const uint32_t s_value = s_key + Config::kKeyBytes;

  // Phase 1: what stays for the whole block.
  copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(
      s_query, head_rows<const Stored<Element>>(problem.query, batch, head), problem.query.stride_row, row_begin,
      num_queries, head_dim);
  copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(
      s_grad_out, head_rows<const Stored<Element>>(params.grad_out, batch, head), params.grad_out.stride_row, row_begin,
      num_queries, value_head_dim);
  ptx::cp_async_commit();
  const float alpha = head_alpha(problem, batch, head), to_z = score_to_z(problem, alpha);
  const EntmaxOf<Element, kKind> entmax{alpha};
  float tau[kFragmentsM][2], delta[kFragmentsM][2];
  const auto row_of = [&](int i, int half) { return warp_row + i * kMmaM + accumulator_row(lane, half); };
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(i, half);
      const int64_t index = row_index(problem, batch, head, row);
      tau[i][half] = row < num_queries ? params.tau[index] : INFINITY;
      delta[i][half] = row < num_queries ? params.delta[index] : 0.0f;
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  QueryFragments query[kFragmentsM];
  GradOutFragments grad_out[kFragmentsM];
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
    query[i].load(s_query, first_row + i * kMmaM);
    grad_out[i].load(s_grad_out, first_row + i * kMmaM);
  }

  // Phase 2: the live tiles, in parts of kBlockN keys.
  const BlockMaskShape mask_shape(num_queries, range.num_keys);
  const int first_group = row_begin / kMaskRows;
  const LiveTiles tiles(params.block_mask + (batch * problem.num_heads + head) * mask_shape.row_words() +
                            int64_t(first_group) * mask_shape.key_words(),
                        min(Config::kBlockM / kMaskRows, mask_shape.num_row_groups - first_group),
                        mask_shape.key_words(), ceil_div(key_end, kMaskKeys));
  const auto copy = [&](int key_begin, int stage) {
    copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(s_key + stage * kStageBytes, g_key,
                                                              problem.key.stride_row, key_begin, key_end, head_dim);
    copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(
        s_value + stage * kStageBytes, g_value, problem.value.stride_row, key_begin, key_end, value_head_dim);
  };

  float grad_query[kFragmentsM][kWarpChunk / kMmaN][4];
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) clear(grad_query[i]);
  for_each_part<Config::kStages>(LiveParts<Config::kBlockN>(tiles), copy, [&](int key_begin, int stage) {
#pragma unroll 1
    for (int first_key = 0; first_key < Config::kBlockN; first_key += Config::kKeysPerStep) {
      const uint32_t step_offset = stage * kStageBytes + first_key * kCols * 2;
      float weight[kFragmentsM][kFragmentsN][4];
      const auto multiply = [&] { multiply_transposed<Element, kCols>(weight, query, s_key + step_offset); };
      if constexpr (kHasMask) {
        ScoreMask<Element>(problem.mask, batch, head, score_scale(problem))
            .multiply_masked(
                weight, warp_row, key_begin + first_key,
                [&](int i, int half) { return range.num_visible_keys(row_of(i, half)); }, multiply);
      } else {
        multiply();
      }
      const bool is_edge = key_begin + first_key + Config::kKeysPerStep > unmasked_end;
      bool is_live = false;
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int visible = is_edge ? range.num_visible_keys(row_of(i, e / 2)) : 0;
#pragma unroll
          for (int n = 0; n < kFragmentsN; ++n) {
            float gap = fmaxf(weight[i][n][e] * to_z - tau[i][e / 2], 0.0f);
            const int col = key_begin + first_key + n * kMmaN + accumulator_col(lane, e % 2);
            if (is_edge && col >= visible) gap = 0.0f;
            weight[i][n][e] = entmax.weight(gap);
            is_live |= gap > 0.0f;
          }
        }
      }
      if (!__any_sync(kAllLanes, is_live)) continue;

      float grad_prob[kFragmentsM][kFragmentsN][4];
      multiply_transposed<Element, kCols>(grad_prob, grad_out, s_value + step_offset);
#pragma unroll
      for (int k = 0; k < kFragmentsN / 2; ++k) {
        MmaOperand<Element> grad_score[kFragmentsM];
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
          for (int n = 2 * k; n < 2 * k + 2; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              grad_prob[i][n][e] = weight[i][n][e] * (grad_prob[i][n][e] - delta[i][e / 2]);
            }
          }
          grad_score[i] = operand_of_accumulators<Element>(grad_prob[i][2 * k], grad_prob[i][2 * k + 1]);
        }
        multiply_add<Element, kCols>(grad_query, grad_score, s_key + step_offset, k * kMmaK, first_col);
      }
    }
  });

  // Phase 3: store. A row whose tau is NaN has no gradient either; that of a row without keys is zero, though in
  // padding the products may have left NaN.
  const float scale = static_cast<float>(problem.scale);
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
    for (int n = 0; n < kWarpChunk / kMmaN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float sum = tau[i][e / 2] < INFINITY ? grad_query[i][n][e] : 0.0f;
        grad_query[i][n][e] = std::isnan(tau[i][e / 2]) ? NAN : sum * scale;
      }
    }
    const int fragment_row = warp_row + i * kMmaM;
    Element* g_rows = head_rows<Element>(params.grad_query, batch, head);
    store_rows(g_rows + fragment_row * params.grad_query.stride_row + first_col, params.grad_query.stride_row,
               grad_query[i], num_queries - fragment_row, head_dim - first_col);
  }
}

}  // namespace adasplash2::cuda
