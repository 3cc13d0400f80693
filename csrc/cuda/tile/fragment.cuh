// Which lane holds what of an mma.m16n8k16, and how fragments come out of a SwizzledTile. 16 columns of floats are two
// fragments of the tile: a lane then holds the columns c, c + 4, c + 8 and c + 12, c = lane % 4, in the places of four
// others. k is a sum, so that does not matter as long as both factors do it.
//
//   accumulator (16 x 8)      value e of a lane: row lane / 4 + 8 * (e / 2), column 2 * (lane % 4) + e % 2
//   A from rows [m][k]        load_a:  16 rows x 16 columns
//   B from rows [n][k]        load_b:  16 rows = two n8 fragments, 16 columns (a product with the tile's transpose)
//   B from rows [k][n]        load_b_transposed: 16 rows, 16 columns = two n8 fragments (a product with the tile)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <dynamic_smem.cuh>
#include <type_traits>

#include "cuda/config.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared_address.cuh"
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

// A fragment as mma.m16n8k16 takes it: A, or two n8 fragments of B.
template <typename Element>
struct MmaOperand {
  uint32_t value[4];
};

// A float is the sum of three bfloat16, all its 24 bits.
template <>
struct MmaOperand<float> {
  uint32_t high[4], middle[4], low[4];

  // The two floats of register i.
  __device__ __forceinline__ void split(int i, float first, float second) {
    high[i] = ptx::pack_bf16(first, second);
    remove(high[i], first, second);
    middle[i] = ptx::pack_bf16(first, second);
    remove(middle[i], first, second);
    low[i] = ptx::pack_bf16(first, second);
  }

 private:
  static __device__ __forceinline__ void remove(uint32_t packed, float& first, float& second) {
    first -= __uint_as_float(packed << 16);
    second -= __uint_as_float(packed & 0xffff0000u);
  }
};

// acc += A * B, with the first or the second of the two n8 fragments that an operand B holds.
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&acc)[4], const MmaOperand<Element>& a,
                                             const MmaOperand<Element>& b, int which) {
  ptx::mma_m16n8k16<Element>(acc, a.value, b.value[2 * which], b.value[2 * which + 1]);
}

// Of the nine products of two sums of three the six largest are formed, the small ones first: what is left out is below
// 2^-24 of the whole.
// NOTE: the tensor cores round towards zero (H200, 2026-11-23: they cut every term 25 bits below the largest, and the
// sum to 24 bits), so a long sum of one sign would drift by half a unit of its own a step. Each step's products are
// therefore added up by themselves, and to the sum as floats are.
template <>
__device__ __forceinline__ void multiply_add(float (&acc)[4], const MmaOperand<float>& a, const MmaOperand<float>& b,
                                             int which) {
  float step[4] = {};
  const auto multiply = [&](const uint32_t (&left)[4], const uint32_t (&right)[4]) {
    ptx::mma_m16n8k16<__nv_bfloat16>(step, left, right[2 * which], right[2 * which + 1]);
  };
  multiply(a.low, b.high);
  multiply(a.high, b.low);
  multiply(a.middle, b.middle);
  multiply(a.middle, b.high);
  multiply(a.high, b.middle);
  multiply(a.high, b.high);
#pragma unroll
  for (int e = 0; e < 4; ++e) acc[e] += step[e];
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
  template <typename Element>
  __device__ __forceinline__ void negate() {
    constexpr uint32_t kSigns = sizeof(Element) == 2 ? 0x80008000u : 0x80000000u;
#pragma unroll
    for (int k = 0; k < kCols / kMmaK; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k][i] ^= kSigns;
    }
  }
};

// The same, left in shared memory and read again at each use: for head dims that registers cannot hold. The swizzle
// repeats every 64 columns: 4 steps of a product at a time have one set of addresses, instead of one per step that the
// compiler keeps in registers; fewer have less.
template <int kCols, int kUnrolled = 4>
struct RowFragmentsInSmem {
  static constexpr int kUnroll = kUnrolled;
  uint32_t s_tile;
  int row;

  __device__ __forceinline__ void load(uint32_t s_tile_, int row_) {
    s_tile = s_tile_;
    row = row_;
  }
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int k) const { load_a<kCols>(fragment, s_tile, row, k); }
};

// Steps of 16 along k in a tile of kCols columns.
template <typename Element, int kCols>
constexpr int kStepsOf = kCols * 2 / static_cast<int>(sizeof(Element)) / kMmaK;

// 16 rows of A at step k.
template <typename Element, typename Fragments>
__device__ __forceinline__ MmaOperand<Element> operand_a(const Fragments& rows, int k) {
  MmaOperand<Element> operand;
  if constexpr (std::is_same_v<Element, float>) {
    uint32_t left[4], right[4];
    rows.get(left, 2 * k);
    rows.get(right, 2 * k + 1);
    operand.split(0, __uint_as_float(left[0]), __uint_as_float(left[2]));
    operand.split(1, __uint_as_float(left[1]), __uint_as_float(left[3]));
    operand.split(2, __uint_as_float(right[0]), __uint_as_float(right[2]));
    operand.split(3, __uint_as_float(right[1]), __uint_as_float(right[3]));
  } else {
    rows.get(operand.value, k);
  }
  return operand;
}

// 16 rows of a tile at step k, transposed.
template <typename Element, int kCols>
__device__ __forceinline__ MmaOperand<Element> operand_b(uint32_t s_tile, int row, int k) {
  MmaOperand<Element> operand;
  if constexpr (std::is_same_v<Element, float>) {
    uint32_t left[4], right[4];
    load_b<kCols>(left, s_tile, row, 2 * k);
    load_b<kCols>(right, s_tile, row, 2 * k + 1);
    operand.split(0, __uint_as_float(left[0]), __uint_as_float(left[1]));
    operand.split(1, __uint_as_float(right[0]), __uint_as_float(right[1]));
    operand.split(2, __uint_as_float(left[2]), __uint_as_float(left[3]));
    operand.split(3, __uint_as_float(right[2]), __uint_as_float(right[3]));
  } else {
    load_b<kCols>(operand.value, s_tile, row, k);
  }
  return operand;
}

// acc (16 kM x 8 kN) = A * tile^T, for a tile of 8 kN rows and kCols columns. Each fragment of the tile feeds kM rows
// of fragments.
template <typename Element, int kCols, int kM, int kN, typename Fragments>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kM][kN][4], const Fragments (&rows)[kM],
                                                    uint32_t s_tile) {
  static_assert(kN % 2 == 0, "an operand B holds two fragments");
#pragma unroll
  for (int i = 0; i < kM; ++i) clear(acc[i]);
#pragma unroll(Fragments::kUnroll * 2 / static_cast<int>(sizeof(Element)))
  for (int k = 0; k < kStepsOf<Element, kCols>; ++k) {
    // NOTE: lets no load of this step move up to those before: parts of several steps at once would spill registers.
    if constexpr (std::is_same_v<Element, float>) __syncwarp();
    MmaOperand<Element> a[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) a[i] = operand_a<Element>(rows[i], k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      if constexpr (std::is_same_v<Element, float>) __syncwarp();
      const auto b = operand_b<Element, kCols>(s_tile, n * kMmaN, k);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        multiply_add(acc[i][n], a[i], b, 0);
        multiply_add(acc[i][n + 1], a[i], b, 1);
      }
    }
  }
}

// The same with 16 rows.
template <typename Element, int kCols, int kN, typename Fragments>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kN][4], const Fragments& rows, uint32_t s_tile) {
  multiply_transposed<Element, kCols>(reinterpret_cast<float (&)[1][kN][4]>(acc),
                                      reinterpret_cast<const Fragments(&)[1]>(rows), s_tile);
}

// Two accumulators side by side as a left operand.
template <typename Element>
__device__ __forceinline__ MmaOperand<Element> operand_of_accumulators(const float (&left)[4],
                                                                       const float (&right)[4]) {
  MmaOperand<Element> operand;
  if constexpr (std::is_same_v<Element, float>) {
    operand.split(0, left[0], left[1]);
    operand.split(1, left[2], left[3]);
    operand.split(2, right[0], right[1]);
    operand.split(3, right[2], right[3]);
  } else {
    accumulators_to_a<Element>(operand.value, left, right);
  }
  return operand;
}

// 16 rows and 16 columns of a tile. ldmatrix transposes 16-bit elements only: floats are loaded one by one, eight rows
// by four different banks at a time.
template <typename Element, int kCols>
__device__ __forceinline__ MmaOperand<Element> operand_b_of_columns(uint32_t s_tile, int first_row, int first_col) {
  MmaOperand<Element> operand;
  if constexpr (std::is_same_v<Element, float>) {
    const uint8_t* smem = dynamic_smem() + (s_tile - ptx::shared_address(dynamic_smem()));
    const int lane = lane_id();
    // Where the lane's column of columns 0 to 7 lies in row `parity` of its pair; all others lie constants away, with
    // bits of the chunk inverted. Said so, ptxas keeps far fewer addresses in registers.
    const auto lane_offset = [&](int parity) {
      return SwizzledTile<kCols>::offset(accumulator_col(lane, parity), lane / 16) + lane / 4 % 4 * 4;
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + i % 2 * 8, chunk = first_col / 4 + i / 2 * 2;
      const auto load = [&](int parity) {
        const uint32_t offset =
            SwizzledTile<kCols>::offset(row, chunk / 8 * 8) + (lane_offset(parity) ^ (chunk % 8 * kChunkBytes));
        return *reinterpret_cast<const float*>(smem + offset);
      };
      operand.split(i, load(0), load(1));
    }
  } else {
    load_b_transposed<kCols>(operand.value, s_tile, first_row, first_col / kMmaN);
  }
  return operand;
}

// acc (16 kM x 8 kN) += left (16 kM x 16) * 16 rows of the tile from first_row on, 8 kN columns from first_col on.
template <typename Element, int kCols, int kM, int kN>
__device__ __forceinline__ void multiply_add(float (&acc)[kM][kN][4], const MmaOperand<Element> (&left)[kM],
                                             uint32_t s_tile, int first_row, int first_col) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    if constexpr (std::is_same_v<Element, float>) __syncwarp();  // as in multiply_transposed()
    const auto b = operand_b_of_columns<Element, kCols>(s_tile, first_row, first_col + n * kMmaN);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      multiply_add(acc[i][n], left[i], b, 0);
      multiply_add(acc[i][n + 1], left[i], b, 1);
    }
  }
}

// acc += left * tile, other_acc += other_left * tile, 16 rows each: the two share each fragment of the tile's 16 rows
// from first_row on.
template <typename Element, int kCols, int kN>
__device__ __forceinline__ void multiply_add_both(float (&acc)[kN][4], const MmaOperand<Element>& left,
                                                  float (&other_acc)[kN][4], const MmaOperand<Element>& other_left,
                                                  uint32_t s_tile, int first_row) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    if constexpr (std::is_same_v<Element, float>) __syncwarp();
    const auto b = operand_b_of_columns<Element, kCols>(s_tile, first_row, n * kMmaN);
    multiply_add(acc[n], left, b, 0);
    multiply_add(acc[n + 1], left, b, 1);
    multiply_add(other_acc[n], other_left, b, 0);
    multiply_add(other_acc[n + 1], other_left, b, 1);
  }
}

// Writes 16 rows of accumulators, rounded to Element, to global memory; rows at and past num_rows and columns at and
// past num_cols (a multiple of 8) are not there.
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
      const float low = acc[n][2 * half], high = acc[n][2 * half + 1];
      if constexpr (std::is_same_v<Element, float>) {
        *reinterpret_cast<float2*>(g_row + n * kMmaN) = make_float2(low, high);
      } else {
        *reinterpret_cast<uint32_t*>(g_row + n * kMmaN) = ptx::pack<Element>(low, high);
      }
    }
  }
}

}  // namespace adasplash2::cuda
