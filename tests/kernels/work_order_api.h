// The order of the blocks of a pass, for ctypes (entry.h): of blocks of so many rows of a mask by rows, of so many keys
// of one by columns.
#pragma once

#include "cuda/launch_pass.cuh"
#include "entry.h"

using namespace adasplash2;

extern "C" int order_rows(const AttentionProblem* problem, const uint32_t* mask, int block_rows, uint8_t* levels,
                          cuda::BlockAt* order) {
  return entry([&] {
    const dim3 grid = cuda::grid_of(*problem, ceil_div<int64_t>(problem->num_queries, block_rows), problem->num_heads);
    cuda::order_rows(*problem, mask, grid, block_rows, {order, levels, nullptr}, nullptr);
  });
}

extern "C" int order_columns(const AttentionProblem* problem, const uint32_t* mask, int block_keys, uint8_t* levels,
                             cuda::BlockAt* order) {
  return entry([&] {
    const dim3 grid = cuda::grid_of(*problem, ceil_div<int64_t>(problem->num_keys, block_keys), problem->num_kv_heads);
    cuda::order_columns(*problem, mask, grid, block_keys, {order, levels, nullptr}, nullptr);
  });
}
