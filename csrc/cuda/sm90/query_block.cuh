// A block of query rows, as the kernels that own rows see it: which rows, which keys, which words of the mask.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "math/block_mask.h"
#include "math/refinement.h"

namespace adasplash2::cuda::sm90 {

template <int kBlockM>
struct QueryBlock {
  int batch, head, kv_head, row_begin;
  WorkRange range;
  BlockMaskShape mask_shape;

  __device__ __forceinline__ QueryBlock(const AttentionProblem& problem, BlockAt block)
      : batch(block.y_and_z >> 16),
        head(block.y_and_z & 0xffff),
        kv_head(kv_head_of(head, problem.num_heads, problem.num_kv_heads)),
        row_begin(block.x * kBlockM),
        range(work_range(problem, batch)),
        mask_shape(range.num_queries, range.num_keys) {}

  // The mask's words of the row group that begins with `row`.
  __device__ __forceinline__ int64_t mask_row(const AttentionProblem& problem, int row) const {
    return (batch * problem.num_heads + head) * mask_shape.row_words() +
           int64_t(row / kMaskRows) * mask_shape.key_words();
  }
  __device__ __forceinline__ int num_row_groups() const {
    return min(kBlockM / kMaskRows, mask_shape.num_row_groups - row_begin / kMaskRows);
  }
  // Is one of kRows rows from `begin` on coarse? All lanes of a warp.
  template <int kRows>
  __device__ __forceinline__ bool any_coarse(const AttentionProblem& problem, const uint8_t* is_coarse,
                                             int begin) const {
    uint32_t any = 0;
    for_each_code<kRows>(problem, is_coarse, begin, [&](uint8_t code) { any |= code; });
    return __any_sync(kAllLanes, any != 0) != 0;
  }
  // Of how many of them is the estimate of tau expected to miss?
  template <int kRows>
  __device__ __forceinline__ float num_misses(const AttentionProblem& problem, const uint8_t* is_coarse,
                                              int begin) const {
    float sum = 0.0f;
    for_each_code<kRows>(problem, is_coarse, begin, [&](uint8_t code) { sum += decode_doubt(code); });
    return warp_sum(sum);
  }
  // Keys that a row of the block may see, and the tiles of the mask that they are in.
  __device__ __forceinline__ int num_visible_keys() const {
    return range.max_visible_keys(row_begin, row_begin + kBlockM);
  }
  __device__ __forceinline__ int num_key_tiles() const { return ceil_div(num_visible_keys(), kMaskKeys); }

 private:
  template <int kRows, typename Body>
  __device__ __forceinline__ void for_each_code(const AttentionProblem& problem, const uint8_t* is_coarse, int begin,
                                                const Body& body) const {
    const uint8_t* g_codes = is_coarse + row_index(problem, batch, head, 0);
#pragma unroll
    for (int i = 0; i < kRows; i += kWarpSize) {
      const int row = begin + i + lane_id();
      body(row < range.num_queries ? g_codes[row] : uint8_t(0));
    }
  }
};

}  // namespace adasplash2::cuda::sm90
