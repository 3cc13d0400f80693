// Rows of global memory into a SwizzledTile, asynchronously.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace adasplash2::cuda {

// Rows [row_begin, row_begin + kRows) x columns [0, kCols) by all kThreads threads. Rows at and past row_end and
// columns at and past num_cols are zeros, and global memory is not read there: padding may hold NaN.
template <int kRows, int kCols, int kThreads, typename Element>
__device__ __forceinline__ void copy_tile_async(uint32_t s_tile, const Element* g_rows, int64_t stride_row,
                                                int row_begin, int row_end, int num_cols) {
  using Tile = SwizzledTile<kCols>;
  constexpr int kChunks = kRows * Tile::kChunksPerRow;
  static_assert(kChunks % kThreads == 0 || kChunks < kThreads, "every thread copies equally many chunks");
#pragma unroll
  for (int i = threadIdx.x; i < kChunks; i += kThreads) {
    const int row = i / Tile::kChunksPerRow, chunk = i % Tile::kChunksPerRow;
    const bool is_there = row_begin + row < row_end && chunk * kChunkElements < num_cols;
    const Element* source = g_rows + (is_there ? (row_begin + row) * stride_row + chunk * kChunkElements : 0);
    ptx::cp_async_16(s_tile + Tile::offset(row, chunk), source, is_there ? kChunkBytes : 0);
  }
}

}  // namespace adasplash2::cuda
