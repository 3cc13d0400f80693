// Where element (row, column) of a tile lies in shared memory, as pure index functions.
//
// Rows of kCols 16-bit elements, or of half as many floats, in chunks of 16 bytes. Chunk c of row r is stored at chunk
// c ^ (r % 8) of that row: the 8 rows that one ldmatrix phase reads at one column then fall into 8 different groups of
// 4 banks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace adasplash2::cuda {

constexpr int kChunkBytes = 16;
template <typename Element>
constexpr int kChunkElements = kChunkBytes / sizeof(Element);

// Columns of a tile of `kHeadDim` elements, in the unit of SwizzledTile.
template <typename Element, int kHeadDim>
constexpr int kTileCols = kHeadDim * sizeof(Element) / 2;

// And back: elements in that many columns.
template <typename Element, int kCols>
constexpr int kChunkOf = kCols * 2 / sizeof(Element);

template <int kCols>
struct SwizzledTile {
  static_assert(kCols % 64 == 0, "a row must fill the 8 chunks that the swizzle permutes");
  static constexpr int kRowBytes = kCols * 2;
  static constexpr int kChunksPerRow = kRowBytes / kChunkBytes;

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }
};

}  // namespace adasplash2::cuda
