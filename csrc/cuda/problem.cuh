// The device's view of params.h: one head's pointers, its range of work and its numbers.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/pass_params.h"
#include "cuda/tile/row_reduce.cuh"
#include "math/entmax.h"
#include "math/work_range.h"
#include "params.h"

namespace adasplash2::cuda {

template <typename Element>
__device__ __forceinline__ Element* head_rows(const Rows& rows, int batch, int head) {
  return static_cast<Element*>(rows.data) + batch * rows.stride_batch + head * rows.stride_head;
}

__device__ __forceinline__ WorkRange work_range(const AttentionProblem& problem, int batch) {
  const int num_keys = static_cast<int>(problem.num_keys);
  int length = num_keys;
  if (problem.key_lengths != nullptr) {
    const int64_t given = problem.key_lengths[batch];
    length = given < 0 ? 0 : given < num_keys ? static_cast<int>(given) : num_keys;
  }
  return {static_cast<int>(problem.num_queries), num_keys, length, problem.is_causal};
}

__device__ __forceinline__ float head_alpha(const AttentionProblem& problem, int batch, int head) {
  if (problem.alpha_heads == nullptr) return static_cast<float>(problem.alpha);
  return static_cast<float>(problem.alpha_heads[batch * problem.alpha_stride_batch + head * problem.alpha_stride_head]);
}

// sigma, but never so small that scores lose their unit: 2^-100 makes them all equal as 0 does.
__device__ __forceinline__ float score_scale(const AttentionProblem& problem) {
  const float scale = static_cast<float>(problem.scale);
  return copysignf(fmaxf(fabsf(scale), 0x1p-100f), scale);
}

// z = score_to_z * <q, k>
__device__ __forceinline__ float score_to_z(const AttentionProblem& problem, float alpha) {
  return (alpha - 1.0f) * score_scale(problem);
}

// The maths of scores whose inputs are Element.
template <typename Element, AlphaKind kKind>
using EntmaxOf = Entmax<kKind, std::conditional_t<std::is_same_v<Element, float>, PrecisePower<float>, FastPower>>;

// What tau may be off where pass B takes its sums, in units of the mean gap: little beside the rounding of the
// gradients, which feel it to first order by way of gap_mean_v.
template <typename Element>
constexpr float kLargestTauError = std::is_same_v<Element, __half> ? 0x1p-11f : 0x1p-9f;

// NOTE: what a reduction leaves lies in uniform registers, and so does all that follows from it without divisions: it
// saves the pointers of a dozen tensors in each thread's own.
__device__ __forceinline__ uint3 block_at(const BlockAt* order) {
  const BlockAt block = order[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)];
  const uint32_t y_and_z = __reduce_max_sync(kAllLanes, block.y_and_z);
  return {__reduce_max_sync(kAllLanes, block.x), y_and_z & 0xffffu, y_and_z >> 16};
}

// Index of a row in a contiguous (B, H, Nq) tensor.
__device__ __forceinline__ int64_t row_index(const AttentionProblem& problem, int batch, int head, int row) {
  return (batch * problem.num_heads + head) * problem.num_queries + row;
}

}  // namespace adasplash2::cuda
