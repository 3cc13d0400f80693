// A block of query rows, as the kernels that own rows see it: which rows, which keys, which words of the mask.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/problem.cuh"
#include "math/block_mask.h"

namespace adasplash2::cuda::sm90 {

// Grid (blocks of kBlockM rows, H, B). Under is_causal the blocks with most work start first.
template <int kBlockM>
struct QueryBlock {
  int batch, head, kv_head, row_begin;
  WorkRange range;
  BlockMaskShape mask_shape;

  __device__ __forceinline__ explicit QueryBlock(const AttentionProblem& problem)
      : batch(blockIdx.z),
        head(blockIdx.y),
        kv_head(kv_head_of(head, problem.num_heads, problem.num_kv_heads)),
        row_begin((problem.is_causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * kBlockM),
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
  // Key tiles that a row of the block may see.
  __device__ __forceinline__ int num_key_tiles() const {
    return ceil_div(range.max_visible_keys(row_begin, row_begin + kBlockM), kMaskKeys);
  }
};

}  // namespace adasplash2::cuda::sm90
