// Where element (row, column) of a tile lies in shared memory, as pure index functions.
//
// Rows of kCols 16-bit elements in chunks of 16 bytes. Chunk c of row r is stored at chunk
// c ^ (r % 8) of that row: the 8 rows that one ldmatrix phase reads at one column then fall into 8 different groups of
// 4 banks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/config.h"

namespace adasplash2::cuda {

constexpr int kChunkBytes = 16;
template <typename Element>
constexpr int kChunkElements = kChunkBytes / sizeof(Element);

// One of the three bfloat16 whose sum is a float. The parts of a row of floats lie behind each other, high, middle and
// low, in memory (any_arch/split_floats.cuh) as in a tile.
struct FloatPart {
  __nv_bfloat16 value;
};

// What kernels find of an Element in memory.
template <typename Element>
using Stored = std::conditional_t<std::is_same_v<Element, float>, FloatPart, Element>;
template <typename Element>
constexpr int kPartsOf = std::is_same_v<Stored<Element>, FloatPart> ? kFloatParts : 1;

// Columns of a tile of `kHeadDim` elements.
template <typename Element, int kHeadDim>
constexpr int kTileCols = kHeadDim * kPartsOf<Element>;

// And back: elements in that many columns.
template <typename Element, int kCols>
constexpr int kChunkOf = kCols / kPartsOf<Element>;

template <int kCols>
struct SwizzledTile {
  static_assert(kCols % 64 == 0, "a row must fill the 8 chunks that the swizzle permutes");
  static constexpr int kRowBytes = kCols * 2;
  static constexpr int kChunksPerRow = kRowBytes / kChunkBytes;

  static __device__ __forceinline__ uint32_t offset(uint32_t row, uint32_t chunk) {
    // NOTE: the same number twice. Said the second way, what lies 8 chunks on is a constant away, and wide rows need
    // fewer addresses in registers; narrow ones need more.
    if constexpr (kCols <= 128) return row * kRowBytes + (chunk ^ row % 8) * kChunkBytes;
    return row * kRowBytes + chunk / 8 * (8 * kChunkBytes) + (chunk % 8 ^ row % 8) * kChunkBytes;
  }
};

}  // namespace adasplash2::cuda
