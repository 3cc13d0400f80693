// The lanes of a warpgroup and the layout of a wgmma accumulator.
//
//   acc[4 n + e] of a lane: row 16 (warp % 4) + lane / 4 + 8 (e / 2), column 8 n + 2 (lane % 4) + e % 2
//
// Four neighbouring values are one mma.m16n8k16 accumulator of the warp's 16 rows: a warp is a row group of the mask.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/fragment.cuh"

namespace adasplash2::cuda::sm90 {

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupWarps = 4;

__device__ __forceinline__ int warpgroup_id() { return threadIdx.x / kWarpgroupThreads; }

// acc (64 x 2 kN) rounded: columns 16 k ... + 15 as an A fragment.
template <typename Element, int kN>
__device__ __forceinline__ void accumulator_to_a(uint32_t (&a)[4], const float (&acc)[kN], int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = ptx::pack<Element>(acc[8 * k + 2 * i], acc[8 * k + 2 * i + 1]);
}

}  // namespace adasplash2::cuda::sm90
