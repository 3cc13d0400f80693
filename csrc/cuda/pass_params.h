// What each pass takes and leaves behind: the same on every architecture. Shapes are those of params.h.
#pragma once

#include <cstdint>

#include "params.h"

namespace adasplash2::cuda {

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

}  // namespace adasplash2::cuda
