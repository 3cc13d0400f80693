// Adds up the rows of each head, in a fixed order: (B, H, Nq) float -> (B, H) double. One block a head.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <dynamic_smem.cuh>

namespace adasplash2::cuda {

struct RowSumParams {
  int64_t num_rows;
  const float* rows;
  double* sums;
};

constexpr int kRowSumThreads = 256;

static __global__ void __launch_bounds__(kRowSumThreads) row_sum_kernel(const RowSumParams params) {
  double* s_sums = reinterpret_cast<double*>(dynamic_smem());  // [kRowSumThreads]
  const int thread = threadIdx.x;
  const float* g_rows = params.rows + blockIdx.x * params.num_rows;
  double sum = 0.0;
  for (int64_t row = thread; row < params.num_rows; row += kRowSumThreads) sum += g_rows[row];
  s_sums[thread] = sum;
  for (int distance = kRowSumThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (thread < distance) s_sums[thread] += s_sums[thread + distance];
  }
  if (thread == 0) params.sums[blockIdx.x] = s_sums[0];
}

}  // namespace adasplash2::cuda
