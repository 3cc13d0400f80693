// Backward, the gradient of a float attn_mask: dS = weight (dP - delta), added up over all that share an element of the
// mask (docs/algorithm.md, section 5), in a fixed order: no atomics, the same bits each run.
//
//   in   query, key, value, grad_out, tau and block_mask of the forward pass, delta (B, H, Nq)
//   out  sums (slabs, elements of the mask) float, each slab laid out like the mask
//
// A block owns kBlockN keys of the mask and kBlockM rows, or the one row where all rows share it. The heads, sequences
// and blocks of rows that add to it are its pairs; those of a slab (GradMaskWork), in order, are its work. Two products
// a pair whose tile is live: Q K^T, dO V^T.
//
// Grid (slabs * row blocks * blocks of keys, heads, sequences of the mask). A warp has 16 rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <dynamic_smem.cuh>

#include "cuda/config.h"
#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "cuda/tile/score_mask.cuh"
#include "cuda/tile/tile_copy.cuh"
#include "math/block_mask.h"
#include "math/entmax.h"

namespace adasplash2::cuda {

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(GradSumsConfig<kTileCols<Element, kHeadDim>>::kThreads,
                                  GradSumsConfig<kTileCols<Element, kHeadDim>>::kMinBlocks)
    grad_mask_kernel(const GradMaskParams params) {
  constexpr int kCols = kTileCols<Element, kHeadDim>;
  using Config = GradSumsConfig<kCols>;
  constexpr int kFragmentsN = Config::kBlockN / kMmaN;
  constexpr int kStageBytes = Config::kBlockN * kCols * 2;

  const AttentionProblem& problem = params.problem;
  const GradMaskWork& work = params.work;
  const int num_queries = static_cast<int>(problem.num_queries), num_keys = static_cast<int>(problem.num_keys);
  const int head_dim = static_cast<int>(problem.head_dim), value_head_dim = static_cast<int>(problem.value_head_dim);
  const int num_key_blocks = ceil_div(num_keys, Config::kBlockN);
  const int key_begin = static_cast<int>(blockIdx.x % num_key_blocks) * Config::kBlockN;
  const int row_block = static_cast<int>(blockIdx.x / num_key_blocks % work.row_blocks);
  const int slab = static_cast<int>(blockIdx.x / num_key_blocks / work.row_blocks);
  const int warp = warp_id(), lane = lane_id();
  const BlockMaskShape mask_shape(num_queries, num_keys);
  const int tile = key_begin / kMaskKeys;

  // Shared memory: queries | grad_out | keys | values.
  uint8_t* smem = dynamic_smem();
  const uint32_t s_query = ptx::shared_address(smem);
  const uint32_t s_grad_out = s_query + Config::kQueryBytes;
  const uint32_t s_key = s_grad_out + Config::kQueryBytes;
  const uint32_t s_value = s_key + kStageBytes;
  RowFragmentsInSmem<kCols> query, grad_out;
  query.load(s_query, warp * kMmaM);
  grad_out.load(s_grad_out, warp * kMmaM);

  struct Pair {
    int batch, head, row_begin;
  };
  const auto pair_at = [&](int64_t index) {
    const int shared_row_block = static_cast<int>(index % work.shared_row_blocks);
    index /= work.shared_row_blocks;
    const int shared_head = static_cast<int>(index % work.shared_heads);
    return Pair{static_cast<int>(blockIdx.z + index / work.shared_heads), static_cast<int>(blockIdx.y) + shared_head,
                (row_block + shared_row_block) * Config::kBlockM};
  };
  const auto is_live = [&](const Pair& pair) {
    const uint32_t* g_words =
        params.block_mask + (pair.batch * problem.num_heads + pair.head) * mask_shape.row_words() + mask_word(tile);
    const int first_group = pair.row_begin / kMaskRows;
    const int end_group = min(first_group + Config::kBlockM / kMaskRows, mask_shape.num_row_groups);
    uint32_t words = 0;
    for (int group = first_group; group < end_group; ++group) words |= g_words[int64_t(group) * mask_shape.key_words()];
    return (words & mask_bit(tile)) != 0;
  };

  float grad[kFragmentsN][4];
  clear(grad);
  const auto add_pair = [&](const Pair& pair) {
    const int batch = pair.batch, head = pair.head, row_begin = pair.row_begin;
    const int kv_head = kv_head_of(head, problem.num_heads, problem.num_kv_heads);
    const WorkRange range = work_range(problem, batch);
    const int warp_row = row_begin + warp * kMmaM;
    const int key_end = range.max_visible_keys(row_begin, row_begin + Config::kBlockM);

    // Phase 1: the four tiles. Other blocks of the SM work meanwhile.
    const auto copy_rows = [&](uint32_t s_tile, const Rows& rows, int num_cols) {
      copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(s_tile,
                                                                head_rows<const Stored<Element>>(rows, batch, head),
                                                                rows.stride_row, row_begin, num_queries, num_cols);
    };
    const auto copy_keys = [&](uint32_t s_tile, const Rows& rows, int num_cols) {
      copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(s_tile,
                                                                head_rows<const Stored<Element>>(rows, batch, kv_head),
                                                                rows.stride_row, key_begin, key_end, num_cols);
    };
    __syncthreads();  // all warps are done with the pair before
    copy_rows(s_query, problem.query, head_dim);
    copy_rows(s_grad_out, params.grad_out, value_head_dim);
    copy_keys(s_key, problem.key, head_dim);
    copy_keys(s_value, problem.value, value_head_dim);
    ptx::cp_async_commit();
    float tau[2], delta[2];
    int visible[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + accumulator_row(lane, half);
      const int64_t index = row_index(problem, batch, head, row);
      tau[half] = row < num_queries ? params.tau[index] : INFINITY;
      delta[half] = row < num_queries ? params.delta[index] : 0.0f;
      visible[half] = range.num_visible_keys(row);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();

    // Phase 2: dS of the pair.
    const float alpha = head_alpha(problem, batch, head), to_z = score_to_z(problem, alpha);
    const EntmaxOf<Element, AlphaKind::kGeneral> entmax{alpha};
    float score[kFragmentsN][4], grad_prob[kFragmentsN][4];
    ScoreMask<Element>(problem.mask, batch, head, score_scale(problem))
        .multiply_masked(
            score, warp_row, key_begin, [&](int half) { return visible[half]; },
            [&] { multiply_transposed<Element, kCols>(score, query, s_key); });
    multiply_transposed<Element, kCols>(grad_prob, grad_out, s_value);
#pragma unroll
    for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float gap = score[n][e] * to_z - tau[e / 2];
        const int key = key_begin + n * kMmaN + accumulator_col(lane, e % 2);
        if (!(gap > 0.0f) || key >= visible[e / 2]) continue;
        grad[n][e] += entmax.weight(gap) * (grad_prob[n][e] - delta[e / 2]);
      }
    }
  };

  // A lane looks whether a pair is live: 32 at a time, the same in all warps.
  const int64_t pair_end = work.first_pair(slab + 1);
  for (int64_t first = work.first_pair(slab); first < pair_end; first += kWarpSize) {
    const int64_t index = first + lane;
    uint32_t live = __ballot_sync(kAllLanes, index < pair_end && is_live(pair_at(index)));
    for (; live != 0; live &= live - 1) add_pair(pair_at(first + __ffs(static_cast<int>(live)) - 1));
  }

  // Phase 3: store.
  const Mask& mask = problem.mask;
  float* g_sums =
      params.sums + slab * work.num_elements + blockIdx.z * mask.stride_batch + blockIdx.y * mask.stride_head;
  if (mask.stride_row != 0) {
#pragma unroll
    for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row_block * Config::kBlockM + warp * kMmaM + accumulator_row(lane, e / 2);
        const int key = key_begin + n * kMmaN + accumulator_col(lane, e % 2);
        if (row < num_queries && key < num_keys) g_sums[row * mask.stride_row + key] = grad[n][e];
      }
    }
    return;
  }
  // All rows share the mask's: they are added up in the lane, then over the lanes of a column, then over the warps.
  float* s_warp_sums = reinterpret_cast<float*>(smem);  // [kWarps][kBlockN]
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      float sum = grad[n][parity] + grad[n][2 + parity];
#pragma unroll
      for (int distance = 4; distance < kWarpSize; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (lane < 4) s_warp_sums[warp * Config::kBlockN + n * kMmaN + accumulator_col(lane, parity)] = sum;
    }
  }
  __syncthreads();
  for (int col = threadIdx.x; col < min(Config::kBlockN, num_keys - key_begin); col += Config::kThreads) {
    float sum = 0.0f;
    for (int i = 0; i < Config::kWarps; ++i) sum += s_warp_sums[i * Config::kBlockN + col];
    g_sums[key_begin + col] = sum;
  }
}

}  // namespace adasplash2::cuda
