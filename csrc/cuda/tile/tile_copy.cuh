// Rows of global memory into a SwizzledTile, asynchronously.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace adasplash2::cuda {

// Rows [row_begin, row_begin + kRows) of a tile, all its columns, by all kThreads threads. Rows at and past row_end and
// columns at and past num_cols are zeros, and global memory is not read there: padding may hold NaN.
template <int kRows, int kCols, int kThreads, typename Element>
__device__ __forceinline__ void copy_tile_async(uint32_t s_tile, const Element* g_rows, int64_t stride_row,
                                                int row_begin, int row_end, int num_cols) {
  using Tile = SwizzledTile<kCols>;
  constexpr int kParts = kPartsOf<Element>, kChunks = Tile::kChunksPerRow / kParts, kRowsPerStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kRowsPerStep == 0, "every thread copies equally much");
  const int first_row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const bool is_col_there = chunk * kChunkElements<Element> < num_cols;
  const Element* g_chunk = g_rows + (row_begin + first_row) * stride_row + chunk * kChunkElements<Element>;
  const int64_t step_elements = kRowsPerStep * stride_row;
  const int part_elements = kParts > 1 ? static_cast<int>(stride_row) / kParts : 0;
#pragma unroll
  for (int step = 0; step < kRows / kRowsPerStep; ++step) {
    const int row = first_row + step * kRowsPerStep;
    const bool is_there = is_col_there && row_begin + row < row_end;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      ptx::cp_async_16(s_tile + Tile::offset(row, part * kChunks + chunk),
                       is_there ? g_chunk + part * part_elements : g_rows, is_there ? kChunkBytes : 0);
    }
    g_chunk += step_elements;
  }
}

}  // namespace adasplash2::cuda
