// Which lane holds what of an mma.m16n8k16, and how fragments come out of a SwizzledTile.
//
//   accumulator (16 x 8)      value e of a lane: row lane / 4 + 8 * (e / 2), column 2 * (lane % 4) + e % 2
//   A from rows [m][k]        load_a:  16 rows x 16 columns
//   B from rows [n][k]        load_b:  16 rows = two n8 fragments, 16 columns (a product with the tile's transpose)
//   B from rows [k][n]        load_b_transposed: 16 rows, 16 columns = two n8 fragments (a product with the tile)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/config.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace adasplash2::cuda {

constexpr int kMmaM = 16;
constexpr int kMmaN = 8;
constexpr int kMmaK = 16;

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarpSize; }

__device__ __forceinline__ constexpr int accumulator_row(int lane, int half) { return lane / 4 + 8 * half; }
__device__ __forceinline__ constexpr int accumulator_col(int lane, int parity) { return 2 * (lane % 4) + parity; }

template <int kCols>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t s_tile, int row, int k) {
  const int lane = lane_id();
  ptx::ldmatrix_x4(a, s_tile + SwizzledTile<kCols>::offset(row + lane % 16, 2 * k + lane / 16));
}

// b[0..1] is the fragment of rows 0-7, b[2..3] that of rows 8-15.
template <int kCols>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t s_tile, int row, int k) {
  const int lane = lane_id();
  ptx::ldmatrix_x4(b, s_tile + SwizzledTile<kCols>::offset(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
}

// b[0..1] is the fragment of columns 0-7, b[2..3] that of columns 8-15.
template <int kCols>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], uint32_t s_tile, int row, int chunk) {
  const int lane = lane_id();
  ptx::ldmatrix_x4_trans(b, s_tile + SwizzledTile<kCols>::offset(row + lane % 16, chunk + lane / 16));
}

// Two accumulators side by side (16 x 16), rounded to the input type, are an A fragment of the next product.
template <typename Element>
__device__ __forceinline__ void accumulators_to_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = ptx::pack<Element>(left[0], left[1]);
  a[1] = ptx::pack<Element>(left[2], left[3]);
  a[2] = ptx::pack<Element>(right[0], right[1]);
  a[3] = ptx::pack<Element>(right[2], right[3]);
}

template <int kN>
__device__ __forceinline__ void clear(float (&acc)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
  }
}

// 16 rows, kCols columns of A in registers.
template <int kCols>
struct RowFragments {
  static constexpr int kUnroll = kCols / kMmaK;  // registers have no index
  uint32_t a[kCols / kMmaK][4];

  __device__ __forceinline__ void load(uint32_t s_tile, int row) {
#pragma unroll
    for (int k = 0; k < kCols / kMmaK; ++k) load_a<kCols>(a[k], s_tile, row, k);
  }
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = a[k][i];
  }
  __device__ __forceinline__ void negate() {
#pragma unroll
    for (int k = 0; k < kCols / kMmaK; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k][i] ^= 0x80008000u;
    }
  }
};

// The same, left in shared memory and read again at each use: for head dims that registers cannot hold.
template <int kCols>
struct RowFragmentsInSmem {
  // The swizzle repeats every 64 columns: one set of addresses, instead of one per k that the compiler keeps in
  // registers.
  static constexpr int kUnroll = 4;
  uint32_t s_tile;
  int row;

  __device__ __forceinline__ void load(uint32_t s_tile_, int row_) {
    s_tile = s_tile_;
    row = row_;
  }
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int k) const { load_a<kCols>(fragment, s_tile, row, k); }
};

// acc (16 x 8 kN) = A * tile^T, for a tile of 8 kN rows and kCols columns.
template <typename Element, int kCols, int kN, typename Fragments>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kN][4], const Fragments& rows, uint32_t s_tile) {
  static_assert(kN % 2 == 0, "load_b brings two fragments");
  clear(acc);
#pragma unroll(Fragments::kUnroll)
  for (int k = 0; k < kCols / kMmaK; ++k) {
    uint32_t a[4];
    rows.get(a, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_b<kCols>(b, s_tile, n * kMmaN, k);
      ptx::mma_m16n8k16<Element>(acc[n], a, b[0], b[1]);
      ptx::mma_m16n8k16<Element>(acc[n + 1], a, b[2], b[3]);
    }
  }
}

// acc (16 x 8 kN) += left (16 x 8 kK, rounded) * columns [8 chunk, 8 chunk + 8 kN) of the tile (8 kK rows).
template <typename Element, int kCols, int kN, int kK>
__device__ __forceinline__ void multiply_add(float (&acc)[kN][4], const float (&left)[kK][4], uint32_t s_tile,
                                             int chunk) {
#pragma unroll
  for (int k = 0; k < kK; k += 2) {
    uint32_t a[4];
    accumulators_to_a<Element>(a, left[k], left[k + 1]);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_b_transposed<kCols>(b, s_tile, k * 8, chunk + n);
      ptx::mma_m16n8k16<Element>(acc[n], a, b[0], b[1]);
      ptx::mma_m16n8k16<Element>(acc[n + 1], a, b[2], b[3]);
    }
  }
}

// Writes 16 rows of accumulators, rounded, to global memory; rows at and past num_rows and columns at and past
// num_cols (a multiple of 8) are not there.
template <typename Element, int kN>
__device__ __forceinline__ void store_rows(Element* g_rows, int64_t stride_row, const float (&acc)[kN][4], int num_rows,
                                           int num_cols) {
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = accumulator_row(lane, half);
    if (row >= num_rows) continue;
    Element* g_row = g_rows + row * stride_row + accumulator_col(lane, 0);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (n * kMmaN >= num_cols) continue;
      *reinterpret_cast<uint32_t*>(g_row + n * kMmaN) = ptx::pack<Element>(acc[n][2 * half], acc[n][2 * half + 1]);
    }
  }
}

}  // namespace adasplash2::cuda
