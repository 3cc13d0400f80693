// The rows of a consumer warpgroup, as the kernels see them that turn scores into gaps and add these up.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/tile/fragment.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "math/entmax.h"
#include "math/work_range.h"

namespace adasplash2::cuda::sm90 {

// The two rows of a lane: where they end, and their sums.
template <AlphaKind kKind>
struct ConsumerRows {
  float tau[2];
  int visible[2];
  float prob_sum[2], weight_sum[2];
  uint32_t num_gaps[2];

  // The warp's 16 rows begin with warp_row; g_tau is the head's.
  __device__ __forceinline__ void init(const WorkRange& range, int warp_row, const float* g_tau) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + accumulator_row(lane_id(), half);
      visible[half] = range.num_visible_keys(row);
      tau[half] = row < range.num_queries ? g_tau[row] : INFINITY;
    }
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      prob_sum[half] = weight_sum[half] = 0.0f;
      num_gaps[half] = 0;
    }
  }

  __device__ __forceinline__ RowSums total(int half) const {
    return {quad_sum(prob_sum[half]), quad_sum(weight_sum[half]), quad_sum(static_cast<float>(num_gaps[half]))};
  }

  // In a tile at an edge, keys that a row does not see score -inf.
  template <int kN>
  __device__ __forceinline__ void mask_edge(float (&score)[kN], int key_begin) const {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const int key = key_begin + i / 4 * 8 + accumulator_col(lane, i % 2);
      if (key >= visible[i / 2 % 2]) score[i] = -INFINITY;
    }
  }

  // Scores into gaps, in place; a NaN score gives no gap.
  template <int kN>
  __device__ __forceinline__ void scores_to_gaps(float (&score)[kN], float to_z) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) score[i] = fmaxf(fmaf(score[i], to_z, -tau[i / 2 % 2]), 0.0f);
  }

  // Counts them, too. Returns whether a row of the warp has one.
  template <int kN>
  __device__ __forceinline__ bool scores_to_counted_gaps(float (&score)[kN], float to_z) {
    const uint32_t num_before = num_gaps[0] + num_gaps[1];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float distance = fmaf(score[i], -to_z, tau[i / 2 % 2]);  // its sign bit is set where gap > 0
      num_gaps[i / 2 % 2] += __float_as_uint(distance) >> 31;
      score[i] = fmaxf(-distance, 0.0f);
    }
    return __any_sync(kAllLanes, num_gaps[0] + num_gaps[1] != num_before);
  }

  template <int kN>
  __device__ __forceinline__ void count_gaps(const float (&gap)[kN]) {
#pragma unroll
    for (int i = 0; i < kN; ++i) num_gaps[i / 2 % 2] += gap[i] > 0.0f;
  }

  // Returns whether the lane has a gap among them.
  template <int kN>
  __device__ __forceinline__ bool add_sums(const float (&gap)[kN], const Entmax<kKind>& entmax) {
    float prob[2] = {}, weight[2] = {};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const int half = i / 2 % 2;
      const float gap_weight = entmax.weight(gap[i]);
      prob[half] = fmaf(gap[i], gap_weight, prob[half]);
      weight[half] += gap_weight;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      prob_sum[half] += prob[half];
      weight_sum[half] += weight[half];
    }
    return weight[0] + weight[1] > 0.0f;
  }

  // The same of prob alone, and gaps become probs.
  template <int kN>
  __device__ __forceinline__ bool gaps_to_probs(float (&gap)[kN], const Entmax<kKind>& entmax) {
    float prob[2] = {};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      gap[i] = entmax.prob(gap[i], entmax.weight(gap[i]));
      prob[i / 2 % 2] += gap[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) prob_sum[half] += prob[half];
    return prob[0] + prob[1] > 0.0f;
  }
};

}  // namespace adasplash2::cuda::sm90
