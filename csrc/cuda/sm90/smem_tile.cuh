// A tile of 16-bit elements as TMA writes it and wgmma reads it.
//
// Panels of 64 columns, one after the other; a row of a panel is 128 bytes, its chunks of 16 bytes permuted by the
// 128-byte swizzle (chunk c of row r at c ^ (r % 8)). Every panel starts on a multiple of 1024 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace adasplash2::cuda::sm90 {

constexpr int kPanelCols = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kWgmmaM = 64;
constexpr int kWgmmaK = 16;

template <int kRows, int kCols>
struct SmemTile {
  static_assert(kRows % 8 == 0 && kCols % kPanelCols == 0, "whole periods of the swizzle");
  static constexpr int kPanels = kCols / kPanelCols;
  static constexpr int kPanelBytes = kRows * kPanelRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;

  // The operand whose M or N are the tile's rows from `row` (a multiple of 8) on and whose K are columns 16 k ... + 15.
  static __device__ __forceinline__ uint64_t k_major(uint32_t s_tile, int row, int k) {
    return ptx::wgmma_descriptor_at(ptx::wgmma_descriptor(s_tile, 16, 8 * kPanelRowBytes, ptx::Swizzle::k128),
                                    k / 4 * kPanelBytes + row * kPanelRowBytes + k % 4 * 32);
  }

  // The operand whose K are the tile's rows 16 k ... + 15 and whose M or N are its columns from panel `panel` on.
  static __device__ __forceinline__ uint64_t mn_major(uint32_t s_tile, int k, int panel = 0) {
    return ptx::wgmma_descriptor_at(ptx::wgmma_descriptor(s_tile, kPanelBytes, 8 * kPanelRowBytes, ptx::Swizzle::k128),
                                    panel * kPanelBytes + k * kWgmmaK * kPanelRowBytes);
  }

  // Byte offset of the 16-byte chunk `chunk` (8 columns) of a row: for ordinary loads and stores.
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * kPanelRowBytes + (((chunk % 8) ^ (row & 7)) << 4);
  }

  // One thread asks for rows [row, row + kRows) of a head; what lies outside the tensor arrives as zeros. `mbarrier`
  // counts kBytes.
  static __device__ __forceinline__ void load(uint32_t s_tile, const TensorMap* map, uint32_t mbarrier, int row,
                                              int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::tma_load(s_tile + panel * kPanelBytes, map, mbarrier, panel * kPanelCols, row, head, batch);
    }
  }
};

}  // namespace adasplash2::cuda::sm90
