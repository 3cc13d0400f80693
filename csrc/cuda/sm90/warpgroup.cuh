// The lanes of a warpgroup and the layout of a wgmma accumulator.
//
//   acc[4 n + e] of a lane: row 16 (warp % 4) + lane / 4 + 8 (e / 2), column 8 n + 2 (lane % 4) + e % 2
//
// Four neighbouring values are one mma.m16n8k16 accumulator of the warp's 16 rows: a warp is a row group of the mask.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/config.h"
#include "cuda/sm90/smem_tile.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/row_reduce.cuh"

namespace adasplash2::cuda::sm90 {

// NOTE: by way of a shuffle ptxas knows it to be the same in the whole warp, and descriptors stay in uniform registers.
__device__ __forceinline__ int warpgroup_id() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
}

// acc (64 x 2 kN) rounded: columns 16 k ... + 15 as an A fragment.
template <typename Element, int kN>
__device__ __forceinline__ void accumulator_to_a(uint32_t (&a)[4], const float (&acc)[kN], int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = ptx::pack<Element>(acc[8 * k + 2 * i], acc[8 * k + 2 * i + 1]);
}

// The 64 rows of a tile, from `row` on, that are a warpgroup's left operand: in registers, or read by wgmma itself.
template <typename Tile, bool kInRegisters>
struct LeftOperand {
  static constexpr int kSteps = Tile::kPanels * kPanelCols / kWgmmaK;
  uint32_t s_tile;
  int row;
  uint32_t fragments[kInRegisters ? kSteps : 1][4];

  __device__ __forceinline__ LeftOperand(uint32_t s_tile_, int row_) : s_tile(s_tile_), row(row_) {
    if constexpr (kInRegisters) {
      const int lane = lane_id(), warp_row = row + warp_id() % kWarpgroupWarps * 16;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        ptx::ldmatrix_x4(fragments[k], s_tile + Tile::offset(warp_row + lane % 16, 2 * k + lane / 16));
      }
    }
  }
};

// Starts acc (64 x the rows of a tile) = left * tile^T.
template <typename Element, typename Tile, int kN, typename LeftTile, bool kInRegisters>
__device__ __forceinline__ void start_product_transposed(float (&acc)[kN],
                                                         const LeftOperand<LeftTile, kInRegisters>& left,
                                                         uint32_t s_tile) {
#pragma unroll
  for (int k = 0; k < left.kSteps; ++k) {
    const uint64_t right = Tile::k_major(s_tile, 0, k);
    if constexpr (kInRegisters) {
      ptx::wgmma_rs<Element, ptx::Major::kK>(acc, left.fragments[k], right, k != 0);
    } else {
      ptx::wgmma_ss<Element, ptx::Major::kK, ptx::Major::kK>(acc, LeftTile::k_major(left.s_tile, left.row, k), right,
                                                             k != 0);
    }
  }
}

// Rounds a warp's 16 rows of an accumulator into rows [tile_row, tile_row + 16) of a tile in shared memory, and starts
// their way to rows [row, row + 16) of a head; what lies outside the tensor is not written. The map's boxes are 16
// rows. Lane 0 waits for the stores before the tile is written again or the block ends.
template <typename Element, typename Tile, int kN>
__device__ __forceinline__ void store_warp_rows(const TensorMap* map, uint32_t s_tile, int tile_row,
                                                const float (&acc)[kN], int row, int head, int batch) {
  const int lane = lane_id();
#pragma unroll
  for (int k = 0; k < kN / 8; ++k) {
    uint32_t fragment[4];
    accumulator_to_a<Element>(fragment, acc, k);
    ptx::stmatrix_x4(s_tile + Tile::offset(tile_row + lane % 16, 2 * k + lane / 16), fragment);
  }
  ptx::fence_proxy_async();
  __syncwarp();
  if (lane != 0) return;
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::tma_store(map, s_tile + panel * Tile::kPanelBytes + tile_row * kPanelRowBytes, panel * kPanelCols, row, head,
                   batch);
  }
  ptx::tma_store_commit();
}

}  // namespace adasplash2::cuda::sm90
