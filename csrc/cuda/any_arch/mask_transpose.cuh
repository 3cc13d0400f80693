// The block mask from rows to columns (block_mask.h): the backward pass of keys and values walks columns.
//
// One warp turns 32 row groups x 32 key tiles: 32 words in, 32 words out. Grid (B * H, group words, key words).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/config.h"
#include "cuda/tile/row_reduce.cuh"
#include "math/block_mask.h"

namespace adasplash2::cuda {

struct MaskTransposeParams {
  BlockMaskShape shape;
  const uint32_t* rows;  // (B * H, num_row_groups, key_words)
  uint32_t* columns;     // (B * H, num_key_tiles, group_words)
};

static __global__ void __launch_bounds__(kWarpSize) mask_transpose_kernel(const MaskTransposeParams params) {
  const BlockMaskShape& shape = params.shape;
  const int key_word = blockIdx.z, group_word = blockIdx.y, lane = threadIdx.x;
  const uint32_t* g_rows = params.rows + blockIdx.x * shape.row_words();
  uint32_t* g_columns = params.columns + blockIdx.x * shape.column_words();

  const int group = group_word * 32 + lane;
  const uint32_t row = group < shape.num_row_groups ? g_rows[int64_t(group) * shape.key_words() + key_word] : 0;
  uint32_t column = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t ballot = __ballot_sync(kAllLanes, (row >> bit & 1u) != 0);
    if (bit == lane) column = ballot;
  }
  const int tile = key_word * 32 + lane;
  if (tile < shape.num_key_tiles) g_columns[int64_t(tile) * shape.group_words() + group_word] = column;
}

}  // namespace adasplash2::cuda
