// Where the forward pass leaves what the backward pass wants, in one buffer whose size depends on shapes alone. (tau,
// the rest of it, is an output of its own.)
//
//   [block mask]  by rows, as in math/block_mask.h
//   [gap_mean_v]  (B, H, Nq, Dv) contiguous, of the dtype of query, from a multiple of 16 bytes on
#pragma once

#include "cuda/launch.h"

namespace adasplash2::cuda {

// head_dim and value_head_dim must be multiples of this: 16 bytes (the caller pads with zeros).
constexpr int64_t kHeadDimMultiple = 8;

struct SupportLayout {
  int64_t mean_offset;
  int64_t bytes;

  explicit SupportLayout(const AttentionProblem& problem) {
    const int64_t num_rows = problem.batch * problem.num_heads * problem.num_queries;
    mean_offset = (block_mask_bytes(problem) + 15) / 16 * 16;
    bytes = mean_offset + num_rows * problem.value_head_dim * size_of(problem.dtype);
  }

  uint32_t* block_mask(void* support) const { return static_cast<uint32_t*>(support); }
  Rows gap_mean_v(void* support, const AttentionProblem& problem) const {
    const int64_t stride_head = problem.num_queries * problem.value_head_dim;
    return {static_cast<uint8_t*>(support) + mean_offset, problem.num_heads * stride_head, stride_head,
            problem.value_head_dim};
  }
};

}  // namespace adasplash2::cuda
