// Backward, first: delta_i = <grad_out_i, gap_mean_v_i>, (B, H, Nq) float, 0 for a row whose tau is NaN: it must not
// reach the gradients of keys. A quad of lanes a row, 16 bytes a load; rows outermost in the grid.
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

constexpr int kDeltaThreads = 256;
constexpr int kDeltaRows = kDeltaThreads / 4;  // of a block

template <typename Element>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(const DeltaParams params) {
  struct alignas(16) Chunk {
    Element elements[16 / sizeof(Element)];
  };
  const AttentionProblem& problem = params.problem;
  const int batch = blockIdx.z, head = blockIdx.y;
  const int row = blockIdx.x * kDeltaRows + threadIdx.x / 4, lane = threadIdx.x % 4;
  const int num_chunks = row < problem.num_queries ? problem.value_head_dim * int(sizeof(Element)) / 16 : 0;
  const auto chunks = [&](const Rows& rows) {
    return reinterpret_cast<const Chunk*>(head_rows<const Element>(rows, batch, head) + row * rows.stride_row);
  };
  const Chunk *g_grad_out = chunks(params.grad_out), *g_mean = chunks(params.gap_mean_v);
  float sum = 0.0f;
  for (int i = lane; i < num_chunks; i += 4) {
    const Chunk grad_out = g_grad_out[i], mean = g_mean[i];
#pragma unroll
    for (int e = 0; e < int(16 / sizeof(Element)); ++e) {
      sum = fmaf(static_cast<float>(grad_out.elements[e]), static_cast<float>(mean.elements[e]), sum);
    }
  }
  sum = quad_sum(sum);
  if (lane != 0 || row >= problem.num_queries) return;
  const int64_t index = row_index(problem, batch, head, row);
  params.delta[index] = std::isnan(params.tau[index]) ? 0.0f : sum;
}

}  // namespace adasplash2::cuda
