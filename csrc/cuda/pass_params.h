// What each pass takes and leaves behind: the same on every architecture. Shapes are those of params.h.
#pragma once

#include <cstdint>

#include "cuda/config.h"
#include "math/block_mask.h"
#include "math/work_range.h"
#include "params.h"

namespace adasplash2::cuda {

inline BlockMaskShape mask_shape(const AttentionProblem& problem) {
  return {static_cast<int>(problem.num_queries), static_cast<int>(problem.num_keys)};
}

// Which block of its grid runs at a place of the order (any_arch/work_order.cuh).
struct BlockAt {
  uint32_t x, y_and_z;  // y in the lower half
};

struct ScanParams {
  AttentionProblem problem;
  float* tau_lower;
  uint8_t* is_coarse;
  uint32_t* block_mask;
  uint16_t* tile_excess;
};

struct OutputParams {
  AttentionProblem problem;
  const float* tau_lower;
  const uint8_t* is_coarse;
  const uint32_t* scan_mask;
  const BlockAt* order;  // sm90's work_queue.cuh has its own
  Rows out;
  Rows gap_mean_v;        // data nullable: not wanted
  float* tau;             // (B, H, Nq) contiguous
  int32_t* support_size;  // (B, H, Nq) contiguous, nullable
  uint32_t* block_mask;
};

struct GradParams {
  AttentionProblem problem;
  const float* tau;            // (B, H, Nq) contiguous
  const float* delta;          // (B, H, Nq) contiguous
  const uint32_t* block_mask;  // by rows for dq, by columns for dk and dv
  const BlockAt* order;        // sm90's work_queue.cuh has its own
  Rows grad_out;
  Rows grad_query;
  Rows grad_key;
  Rows grad_value;
};

struct GradAlphaParams {
  AttentionProblem problem;
  const float* tau;            // (B, H, Nq) contiguous
  const uint32_t* block_mask;  // by rows
  Rows grad_out;
  float* row_grads;  // (B, H, Nq) contiguous
};

// How the gradient of attn_mask is cut into blocks: by rows and keys of the mask, and, where those are few, what adds
// to each of them into slabs, to be added up afterwards. It depends on shapes and strides alone, as does the result
// then.
struct GradMaskWork {
  int64_t num_elements;   // of the mask, which is dense
  int row_blocks;         // of grad_block_rows() rows of the mask; 1 where all rows share one
  int shared_row_blocks;  // that share a row of the mask, else 1
  int shared_heads, shared_batches;
  int num_slabs;  // 0 where all keys of a row share an element: those gradients add up to zero

  explicit GradMaskWork(const AttentionProblem& problem) {
    constexpr int64_t kEnoughBlocks = 1024;  // for any GPU
    const Mask& mask = problem.mask;
    const auto shared = [](int64_t stride, int64_t size) { return stride == 0 ? static_cast<int>(size) : 1; };
    const int num_row_blocks =
        static_cast<int>(ceil_div<int64_t>(problem.num_queries, grad_block_rows(instance_cols(problem))));
    shared_batches = shared(mask.stride_batch, problem.batch);
    shared_heads = shared(mask.stride_head, problem.num_heads);
    shared_row_blocks = shared(mask.stride_row, num_row_blocks);
    row_blocks = mask.stride_row == 0 ? 1 : num_row_blocks;
    const int64_t num_heads = problem.batch / shared_batches * (problem.num_heads / shared_heads);
    num_elements =
        num_heads * (mask.stride_row == 0 ? 1 : problem.num_queries) * (mask.stride_col == 0 ? 1 : problem.num_keys);
    const int64_t num_blocks = num_heads * row_blocks * ceil_div<int64_t>(problem.num_keys, kMaskKeys);
    const int64_t most_slabs = num_blocks == 0 ? 1 : ceil_div(kEnoughBlocks, num_blocks);
    num_slabs = mask.stride_col == 0 ? 0 : static_cast<int>(num_pairs() < most_slabs ? num_pairs() : most_slabs);
  }

  ADASPLASH2_HOST_DEVICE int64_t num_pairs() const {
    return int64_t(shared_batches) * shared_heads * shared_row_blocks;
  }
  ADASPLASH2_HOST_DEVICE int64_t first_pair(int slab) const { return num_pairs() * slab / num_slabs; }
  int64_t slab_bytes() const { return num_slabs > 1 ? num_slabs * num_elements * int64_t(sizeof(float)) : 0; }
};

struct GradMaskParams {
  AttentionProblem problem;
  const float* tau;            // (B, H, Nq) contiguous
  const float* delta;          // (B, H, Nq) contiguous
  const uint32_t* block_mask;  // by rows
  Rows grad_out;
  GradMaskWork work;
  float* sums;  // (slabs, elements of the mask)
};

}  // namespace adasplash2::cuda
