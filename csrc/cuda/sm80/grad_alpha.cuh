// Backward, dalpha: what each row adds to the gradient by the alpha of its head (docs/algorithm.md, section 5), over
// the live tiles of a block of rows. any_arch/row_sum.cuh adds the rows up.
//
//   in   query, key, value, grad_out (B, H, Nq, Dv), tau and block_mask of the forward pass
//   out  row_grads (B, H, Nq) float, 0 for rows without a support
//
// Grid (blocks of kBlockM rows, H, B). A warp owns 16 rows. Two products a tile: Q K^T, dO V^T. delta comes from the
// same sums as the terms that it is subtracted from, not from the saved mean, whose rounding would be all that is left
// of them.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <dynamic_smem.cuh>

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

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(GradSumsConfig<kTileCols<Element, kHeadDim>>::kThreads,
                                  GradSumsConfig<kTileCols<Element, kHeadDim>>::kMinBlocks)
    grad_alpha_kernel(const GradAlphaParams params) {
  constexpr int kCols = kTileCols<Element, kHeadDim>;
  using Config = GradSumsConfig<kCols>;
  constexpr int kFragmentsN = Config::kBlockN / kMmaN;
  constexpr int kStageBytes = Config::kBlockN * kCols * 2;

  const AttentionProblem& problem = params.problem;
  const int batch = blockIdx.z, head = blockIdx.y;
  const int m_block = problem.is_causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int kv_head = kv_head_of(head, problem.num_heads, problem.num_kv_heads);
  const int warp = warp_id(), lane = lane_id();
  const int row_begin = m_block * Config::kBlockM, warp_row = row_begin + warp * kMaskRows;

  const WorkRange range = work_range(problem, batch);
  const int num_queries = range.num_queries;
  const int head_dim = static_cast<int>(problem.head_dim), value_head_dim = static_cast<int>(problem.value_head_dim);
  const int key_end = range.max_visible_keys(row_begin, row_begin + Config::kBlockM);
  const auto* g_key = head_rows<const Stored<Element>>(problem.key, batch, kv_head);
  const auto* g_value = head_rows<const Stored<Element>>(problem.value, batch, kv_head);

  // Shared memory: queries | grad_out | keys | values.
  const uint32_t s_query = ptx::shared_address(dynamic_smem());
  const uint32_t s_grad_out = s_query + Config::kQueryBytes;
  const uint32_t s_key = s_grad_out + Config::kQueryBytes;
  const uint32_t s_value = s_key + kStageBytes;

  // Phase 1: what stays for the whole block.
  copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(
      s_query, head_rows<const Stored<Element>>(problem.query, batch, head), problem.query.stride_row, row_begin,
      num_queries, head_dim);
  copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(
      s_grad_out, head_rows<const Stored<Element>>(params.grad_out, batch, head), params.grad_out.stride_row, row_begin,
      num_queries, value_head_dim);
  ptx::cp_async_commit();
  const float alpha = head_alpha(problem, batch, head), to_z = score_to_z(problem, alpha);
  const EntmaxOf<Element, AlphaKind::kGeneral> entmax{alpha};
  float tau[2];
  int visible[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + accumulator_row(lane, half);
    tau[half] = row < num_queries ? params.tau[row_index(problem, batch, head, row)] : INFINITY;
    visible[half] = range.num_visible_keys(row);
  }
  RowFragmentsInSmem<kCols> query, grad_out;
  query.load(s_query, warp * kMmaM);
  grad_out.load(s_grad_out, warp * kMmaM);

  // Phase 2: the sums over the live tiles, in parts of kBlockN keys. Nothing is prefetched: the pass is run for a
  // number a head.
  const BlockMaskShape mask_shape(num_queries, range.num_keys);
  const int first_group = row_begin / kMaskRows;
  LiveTiles tiles(params.block_mask + (batch * problem.num_heads + head) * mask_shape.row_words() +
                      int64_t(first_group) * mask_shape.key_words(),
                  min(Config::kWarps, mask_shape.num_row_groups - first_group), mask_shape.key_words(),
                  ceil_div(key_end, kMaskKeys));
  GradSums<float> sums[2] = {};
  for (int tile = tiles.next(); tile >= 0; tile = tiles.next()) {
    for (int key_begin = tile * kMaskKeys; key_begin < (tile + 1) * kMaskKeys; key_begin += Config::kBlockN) {
      copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(s_key, g_key, problem.key.stride_row, key_begin,
                                                                key_end, head_dim);
      copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(s_value, g_value, problem.value.stride_row, key_begin,
                                                                key_end, value_head_dim);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      float score[kFragmentsN][4], grad_prob[kFragmentsN][4];
      const auto multiply = [&] { multiply_transposed<Element, kCols>(score, query, s_key); };
      if (problem.mask.data != nullptr) {
        ScoreMask<Element>(problem.mask, batch, head, score_scale(problem))
            .multiply_masked(score, warp_row, key_begin, [&](int half) { return visible[half]; }, multiply);
      } else {
        multiply();
      }
      multiply_transposed<Element, kCols>(grad_prob, grad_out, s_value);
#pragma unroll
      for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float gap = score[n][e] * to_z - tau[e / 2];
          const int key = key_begin + n * kMmaN + accumulator_col(lane, e % 2);
          if (!(gap > 0.0f) || key >= visible[e / 2]) continue;
          const float weight = entmax.weight(gap), prob = entmax.prob(gap, weight);
          sums[e / 2].add(prob, weight, grad_prob[n][e], -prob * entmax.exponent() * logf(gap));
        }
      }
      __syncthreads();  // the stage is free again
    }
  }
  ptx::cp_async_wait<0>();

  // Phase 3: a row's sums lie in the four lanes of its quad.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const GradSums<float> total = {quad_sum(sums[half].weight), quad_sum(sums[half].weight_grad),
                                   quad_sum(sums[half].prob_grad), quad_sum(sums[half].entropy),
                                   quad_sum(sums[half].entropy_grad)};
    const int row = warp_row + accumulator_row(lane, half);
    if (lane % 4 == 0 && row < num_queries) {
      params.row_grads[row_index(problem, batch, head, row)] = total.weight > 0.0f ? total.by_alpha(alpha) : 0.0f;
    }
  }
}

}  // namespace adasplash2::cuda
