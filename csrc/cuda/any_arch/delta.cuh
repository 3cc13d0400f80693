// Backward, first: delta_i = <grad_out_i, gap_mean_v_i>, (B, H, Nq) float, 0 for a row whose tau is NaN: it must not
// reach the gradients of keys. One warp a row; rows outermost in the grid.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/config.h"
#include "cuda/problem.cuh"
#include "cuda/tile/row_reduce.cuh"

namespace adasplash2::cuda {

struct DeltaParams {
  AttentionProblem problem;
  Rows grad_out;
  Rows gap_mean_v;
  const float* tau;
  float* delta;
};

constexpr int kDeltaWarps = 8;

template <typename Element>
__global__ void __launch_bounds__(kDeltaWarps* kWarpSize) delta_kernel(const DeltaParams params) {
  const AttentionProblem& problem = params.problem;
  const int batch = blockIdx.z, head = blockIdx.y;
  const int row = blockIdx.x * kDeltaWarps + threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (row >= problem.num_queries) return;
  const Element* g_grad_out = head_rows<const Element>(params.grad_out, batch, head) + row * params.grad_out.stride_row;
  const Element* g_mean = head_rows<const Element>(params.gap_mean_v, batch, head) + row * params.gap_mean_v.stride_row;
  float sum = 0.0f;
  for (int col = lane; col < problem.value_head_dim; col += kWarpSize) {
    sum += static_cast<float>(g_grad_out[col]) * static_cast<float>(g_mean[col]);
  }
  sum = warp_sum(sum);
  const int64_t index = row_index(problem, batch, head, row);
  if (lane == 0) params.delta[index] = std::isnan(params.tau[index]) ? 0.0f : sum;
}

}  // namespace adasplash2::cuda
