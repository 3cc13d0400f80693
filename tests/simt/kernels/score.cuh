// A small sm_80 kernel with one of everything, and the bugs that the emulator must find in it.
//
// Row maximum and 16-bin histogram of score = scale * query key^T, head dimension 64. Grid: (ceil(N / 64), heads), one
// block of 4 warps for 64 rows; keys come in tiles of 64 through two stages of cp.async. Shared memory: query tile and
// two key tiles [64, 64] bf16 in 16-byte chunks at (chunk ^ row % 8), then the histogram [64, 16] u32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <dynamic_smem.cuh>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared_address.cuh"

namespace score {

using namespace adasplash2;

enum class Bug : int {
  kNone,
  kNoCopyWait,             // cp.async.wait_group deleted
  kNoBarrierAfterWait,     // __syncthreads after the wait deleted
  kNoBarrierBeforeRefill,  // __syncthreads before the stage is filled again deleted
  kNoSwizzle,              // ldmatrix reads the keys as if they were not swizzled
  kPlainIncrement,         // ++ instead of atomicAdd
  kDivergentShuffle,       // shuffle with the full mask inside a branch that half the lanes take
  kNoRowGuard,             // rows past the end are stored
  kNoInitialisation,       // the histogram is never cleared
  kMisalignedCopy,         // copies of 16 bytes from addresses that are multiples of 2 only
  kEarlyExit,              // warp 3 returns before the last barriers
};

constexpr int kRows = 64, kDim = 64, kBins = 16, kThreads = 128;
constexpr int kTileBytes = kRows * kDim * 2;
constexpr int kSmemBytes = 3 * kTileBytes + kRows * kBins * 4;

__device__ __forceinline__ uint32_t swizzled_offset(int row, int chunk) {
  return row * kDim * 2 + ((chunk ^ (row % 8)) << 4);
}

__device__ __forceinline__ void load_tile(uint32_t s_tile, const __nv_bfloat16* g_tile, int row0, int num_rows) {
  constexpr int kChunks = kDim / 8;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool is_inside = row0 + row < num_rows;
    const __nv_bfloat16* source = g_tile + int64_t{is_inside ? row0 + row : 0} * kDim + chunk * 8;
    ptx::cp_async_16(s_tile + swizzled_offset(row, chunk), source, is_inside ? 16 : 0);
  }
}

__global__ void __launch_bounds__(kThreads)
    score_kernel(const __nv_bfloat16* __restrict__ query, const __nv_bfloat16* __restrict__ key,
                 float* __restrict__ row_max, unsigned* __restrict__ histogram, int num_rows, float scale, float low,
                 float inverse_width, Bug bug) {
  uint8_t* smem = dynamic_smem();
  unsigned* s_histogram = reinterpret_cast<unsigned*>(smem + 3 * kTileBytes);
  const uint32_t s_query = ptx::shared_address(smem), s_key = s_query + kTileBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = blockIdx.x * kRows;
  const int64_t head_row = int64_t{blockIdx.y} * num_rows;
  query += head_row * kDim;
  key += head_row * kDim;
  row_max += head_row;
  histogram += head_row * kBins;

  if (bug != Bug::kNoInitialisation) {
    for (int i = threadIdx.x; i < kRows * kBins; i += kThreads) s_histogram[i] = 0;
  }
  load_tile(s_query, query + (bug == Bug::kMisalignedCopy ? 1 : 0), row0, num_rows);
  load_tile(s_key, key, 0, num_rows);
  ptx::cp_async_commit();

  uint32_t a[kDim / 16][4];
  float maximum[2] = {-INFINITY, -INFINITY};
  const int num_tiles = (num_rows + kRows - 1) / kRows;
  for (int tile = 0; tile < num_tiles; ++tile) {
    if (tile + 1 < num_tiles) load_tile(s_key + (tile + 1) % 2 * kTileBytes, key, (tile + 1) * kRows, num_rows);
    ptx::cp_async_commit();
    if (bug != Bug::kNoCopyWait) ptx::cp_async_wait<1>();
    if (bug != Bug::kNoBarrierAfterWait) __syncthreads();
    if (tile == 0) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        ptx::ldmatrix_x4(a[k], s_query + swizzled_offset(warp * 16 + lane % 16, k * 2 + lane / 16));
      }
    }
    const uint32_t s_tile = s_key + tile % 2 * kTileBytes;
#pragma unroll
    for (int n = 0; n < kRows / 16; ++n) {
      float acc[2][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        uint32_t b[4];
        const int row = n * 16 + lane % 8 + lane / 16 * 8, chunk = k * 2 + lane / 8 % 2;
        const uint32_t offset = bug == Bug::kNoSwizzle ? row * kDim * 2 + chunk * 16 : swizzled_offset(row, chunk);
        ptx::ldmatrix_x4(b, s_tile + offset);
        ptx::mma_m16n8k16_bf16(acc[0], a[k], b[0], b[1]);
        ptx::mma_m16n8k16_bf16(acc[1], a[k], b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i / 4, j = i % 4;
        const int col = tile * kRows + n * 16 + half * 8 + lane % 4 * 2 + j % 2;
        const int row = warp * 16 + lane / 4 + j / 2 * 8;
        if (col >= num_rows) continue;
        const float score = acc[half][j] * scale;
        maximum[j / 2] = fmaxf(maximum[j / 2], score);
        const int bin = max(0, min(kBins - 1, __float2int_rd((score - low) * inverse_width)));
        if (bug == Bug::kPlainIncrement) {
          s_histogram[row * kBins + bin]++;
        } else {
          atomicAdd(&s_histogram[row * kBins + bin], 1u);
        }
      }
    }
    if (bug == Bug::kEarlyExit && warp == 3 && tile == 1) return;
    if (bug != Bug::kNoBarrierBeforeRefill) __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    maximum[i] = fmaxf(maximum[i], __shfl_xor_sync(0xffffffffu, maximum[i], 1));
    if (bug != Bug::kDivergentShuffle || (lane & 2) != 0) {
      maximum[i] = fmaxf(maximum[i], __shfl_xor_sync(0xffffffffu, maximum[i], 2));
    }
    const int row = row0 + warp * 16 + lane / 4 + i * 8;
    if (lane % 4 == 0 && (row < num_rows || bug == Bug::kNoRowGuard)) row_max[row] = maximum[i];
  }
  for (int i = threadIdx.x; i < kRows * kBins; i += kThreads) {
    if (row0 + i / kBins < num_rows) histogram[int64_t{row0} * kBins + i] = s_histogram[i];
  }
}

}  // namespace score
