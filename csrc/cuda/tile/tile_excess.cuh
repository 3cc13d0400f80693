// How far a tile's scores exceeded the thresholds of their time, kept until the thresholds are final.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace adasplash2::cuda {

// A tile is marked live by thresholds that are still low, most of all early in the walk. What decides in the end is
// whether some score of it is above its row's last threshold. With `excess` the most by which a score of a 16-row group
// exceeded the snapshot of its row, and `rise` the least by which a row's threshold has risen since, the tile is dead
// where excess < rise. The excess is kept as the upper half of a float, rounded up.
constexpr float kRoundUp = 1.0f + 0x1p-16f;  // covers the rounding of the differences

__device__ __forceinline__ uint16_t encode_excess(float excess) {
  const uint32_t bits = __float_as_uint(excess * kRoundUp);
  return static_cast<uint16_t>((bits + 0xffffu) >> 16);
}
__device__ __forceinline__ float decode_excess(uint16_t code) {
  return __uint_as_float(static_cast<uint32_t>(code) << 16);
}

// The snapshot that a tile is measured against: 0 before the first tile, k after 2^(k-1) tiles.
__device__ __forceinline__ int snapshot_of(int num_tiles_before) { return 32 - __clz(num_tiles_before); }

}  // namespace adasplash2::cuda
