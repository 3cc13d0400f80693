// Blocks of a pass in order of their work, most first, so that no long one starts when the others are done. Work is
// live tiles; blocks within a factor of about 1.4 of each other count as equal and stay in the grid's order, in which
// neighbours share what they load. The order decides when a block runs, never what it computes.
//
//   levels  (blocks,) uint8: twice the logarithm of a block's live tiles. A warp a block
//   order   (blocks,) BlockAt: which block runs at each place of the grid, x fastest. One block of threads
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <dynamic_smem.cuh>

#include "cuda/config.h"
#include "cuda/pass_params.h"
#include "cuda/tile/row_reduce.cuh"
#include "math/work_range.h"

namespace adasplash2::cuda {

// The live tiles of block (x, y, z) of a grid are the set bits of num_runs runs of run_words words: run i begins at
// (z heads_y + y % heads_y) stride_y + x / shared_x stride_x + i stride_run of `words`, and none reaches past end_x
// words from the beginning of its (y, z).
struct WorkLevelsParams {
  const uint32_t* words;
  dim3 grid;
  int heads_y;
  int shared_x;  // neighbouring blocks that have the same tiles, for parts of their keys
  int num_runs, run_words;
  int64_t stride_x, stride_y, stride_run, end_x;
  uint8_t* levels = nullptr;
};

constexpr int kWorkLevels = kWarpSize;  // the last one is all from 2^15.5 tiles on
constexpr int kWorkLevelWarps = 8;

static __global__ void __launch_bounds__(kWorkLevelWarps* kWarpSize) work_levels_kernel(const WorkLevelsParams params) {
  const int64_t index = int64_t(blockIdx.x) * kWorkLevelWarps + threadIdx.x / kWarpSize;
  if (index >= int64_t(params.grid.x) * params.grid.y * params.grid.z) return;
  const int64_t x = index % params.grid.x, y = index / params.grid.x % params.grid.y;
  const int64_t z = index / params.grid.x / params.grid.y;
  const int64_t begin = x / params.shared_x * params.stride_x;
  const uint32_t* g_words = params.words + (z * params.heads_y + y % params.heads_y) * params.stride_y;
  int num_live = 0;
  for (int run = 0; run < params.num_runs; ++run) {
    for (int word = threadIdx.x % kWarpSize; word < params.run_words && begin + word < params.end_x;
         word += kWarpSize) {
      num_live += __popc(g_words[begin + run * params.stride_run + word]);
    }
  }
  num_live = __reduce_add_sync(kAllLanes, num_live);
  // Exponent and first bit of the mantissa.
  const uint32_t level = (__float_as_uint(static_cast<float>(num_live + 1)) >> 22) - (127u << 1);
  if (threadIdx.x % kWarpSize == 0) params.levels[index] = static_cast<uint8_t>(min(level, kWorkLevels - 1u));
}

struct WorkOrderParams {
  dim3 grid;
  const uint8_t* levels;
  BlockAt* order;
};

constexpr int kWorkOrderThreads = 512;
constexpr int kThreadsALane = kWorkOrderThreads / kWarpSize;  // whose counts it adds up
constexpr int kLevelWords = kWorkOrderThreads + kWarpSize;    // one unused after each kThreadsALane: other banks
constexpr int kWorkOrderBytes = kWorkLevels * (kLevelWords + 1) * 4;

// Sorts by counting, stable: each thread counts and places a range of the blocks.
static __global__ void __launch_bounds__(kWorkOrderThreads) work_order_kernel(const WorkOrderParams params) {
  uint32_t* s_place = reinterpret_cast<uint32_t*>(dynamic_smem());  // [kWorkLevels][kLevelWords]
  uint32_t* s_level_place = s_place + kWorkLevels * kLevelWords;    // [kWorkLevels], the last level first
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int num_blocks = static_cast<int>(params.grid.x * params.grid.y * params.grid.z);
  const int range = ceil_div(num_blocks, kWorkOrderThreads);
  const int begin = min(thread * range, num_blocks), end = min(begin + range, num_blocks);
  const auto place = [&](int level, int of_thread) -> uint32_t& {
    return s_place[level * kLevelWords + of_thread + of_thread / kThreadsALane];
  };
  // body(block, its level) for this thread's range.
  const auto for_each_block = [&](const auto& body) {
    constexpr int kBatch = 16;  // levels in flight
    for (int first = begin; first < end; first += kBatch) {
      uint8_t level[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) level[i] = first + i < end ? params.levels[first + i] : 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < end) body(first + i, level[i]);
      }
    }
  };
  for (int level = 0; level < kWorkLevels; ++level) place(level, thread) = 0;
  for_each_block([&](int, int level) { ++place(level, thread); });
  __syncthreads();

  // Counts become places: within a level, a warp a level, and then from the last level down.
  const auto sum_to = [&](uint32_t sum) {  // over the lanes up to this one
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += below;
    }
    return sum;
  };
  for (int level = thread / kWarpSize; level < kWorkLevels; level += kWorkOrderThreads / kWarpSize) {
    uint32_t count[kThreadsALane], sum = 0;
#pragma unroll
    for (int i = 0; i < kThreadsALane; ++i) sum += count[i] = place(level, lane * kThreadsALane + i);
    const uint32_t all = sum_to(sum);
    uint32_t before = all - sum;
#pragma unroll
    for (int i = 0; i < kThreadsALane; ++i) {
      place(level, lane * kThreadsALane + i) = before;
      before += count[i];
    }
    if (lane == kWarpSize - 1) s_level_place[kWorkLevels - 1 - level] = all;
  }
  __syncthreads();
  if (thread < kWarpSize) {
    const uint32_t count = s_level_place[thread];
    s_level_place[thread] = sum_to(count) - count;
  }
  __syncthreads();
  for_each_block([&](int block, int level) {
    const uint32_t at = s_level_place[kWorkLevels - 1 - level] + place(level, thread)++;
    const uint32_t x = block % params.grid.x, y_z = block / params.grid.x;
    params.order[at] = {x, y_z % params.grid.y | y_z / params.grid.y << 16};
  });
}

}  // namespace adasplash2::cuda
