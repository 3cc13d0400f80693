// A block of query rows, as the kernels that own rows see it: which rows, which keys, which words of the mask.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "math/block_mask.h"

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
  // Keys that a row of the block may see, and the tiles of the mask that they are in.
  __device__ __forceinline__ int num_visible_keys() const {
    return range.max_visible_keys(row_begin, row_begin + kBlockM);
  }
  __device__ __forceinline__ int num_key_tiles() const { return ceil_div(num_visible_keys(), kMaskKeys); }
};

}  // namespace adasplash2::cuda::sm90
