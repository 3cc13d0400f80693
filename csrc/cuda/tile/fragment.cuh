// Which lane holds what of an mma.m16n8k16, and how fragments come out of a SwizzledTile. A fragment of floats is three
// of the tile: one of each part.
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
constexpr int kStepBytes = kMmaK * 2;  // of a row of a tile
// The swizzle of a tile repeats every 64 columns: what a step reads lies a constant behind what it read 4 steps ago.
constexpr int kStepsPerSwizzle = 4;

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

template <int kN>
__device__ __forceinline__ void clear(float (&acc)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
  }
}

__device__ __forceinline__ void add(float (&acc)[4], const float (&other)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) acc[e] += other[e];
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

// Two accumulators += A * B: one for each of the two n8 fragments that an operand B holds.
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&first)[4], float (&second)[4], const MmaOperand<Element>& a,
                                             const MmaOperand<Element>& b) {
  ptx::mma_m16n8k16<Element>(first, a.value, b.value[0], b.value[1]);
  ptx::mma_m16n8k16<Element>(second, a.value, b.value[2], b.value[3]);
}

// A product of floats is six of the nine products of their parts; what is left out is below 2^-24 of it. One of them is
// of its size, five are below 2^-7 of it.
// NOTE: the tensor cores round towards zero (H200, 2026-11-23: they cut every term 25 bits below the largest, and the
// sum to 24 bits), so a long sum of one sign drifts by half a unit of its own a step. That is nothing in a sum of small
// products; a few steps of the large ones are added up by themselves, and to the whole as floats are.
__device__ __forceinline__ void multiply_add_large(float (&first)[4], float (&second)[4], const MmaOperand<float>& a,
                                                   const MmaOperand<float>& b) {
  ptx::mma_m16n8k16<__nv_bfloat16>(first, a.high, b.high[0], b.high[1]);
  ptx::mma_m16n8k16<__nv_bfloat16>(second, a.high, b.high[2], b.high[3]);
}

__device__ __forceinline__ void multiply_add_small(float (&first)[4], float (&second)[4], const MmaOperand<float>& a,
                                                   const MmaOperand<float>& b) {
  const auto multiply = [&](const uint32_t (&left)[4], const uint32_t (&right)[4]) {
    ptx::mma_m16n8k16<__nv_bfloat16>(first, left, right[0], right[1]);
    ptx::mma_m16n8k16<__nv_bfloat16>(second, left, right[2], right[3]);
  };
  multiply(a.low, b.high);
  multiply(a.high, b.low);
  multiply(a.middle, b.middle);
  multiply(a.middle, b.high);
  multiply(a.high, b.middle);
}

template <>
__device__ __forceinline__ void multiply_add(float (&first)[4], float (&second)[4], const MmaOperand<float>& a,
                                             const MmaOperand<float>& b) {
  float step[2][4];
  clear(step);
  multiply_add_small(step[0], step[1], a, b);
  multiply_add_large(step[0], step[1], a, b);
  add(first, step[0]);
  add(second, step[1]);
}

// Two accumulators side by side (16 x 16), rounded to the input type, are an A fragment of the next product.
template <typename Element>
__device__ __forceinline__ void accumulators_to_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = ptx::pack<Element>(left[0], left[1]);
  a[1] = ptx::pack<Element>(left[2], left[3]);
  a[2] = ptx::pack<Element>(right[0], right[1]);
  a[3] = ptx::pack<Element>(right[2], right[3]);
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
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = a[k][i];
  }
};

// The same, left in shared memory and read again at each use: for head dims that registers cannot hold. Fewer steps of
// a product at a time take fewer registers for addresses.
template <int kCols, int kUnrolled = kStepsPerSwizzle>
struct RowFragmentsInSmem {
  static constexpr int kUnroll = kUnrolled;
  uint32_t s_tile;
  int row;

  __device__ __forceinline__ void load(uint32_t s_tile_, int row_) {
    s_tile = s_tile_;
    row = row_;
  }
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int first, int k) const {
    load_a<kCols>(fragment, s_tile + first * kStepBytes, row, k);
  }
};

// Steps of 16 along k in a tile of kCols columns.
template <typename Element, int kCols>
constexpr int kStepsOf = kCols / kPartsOf<Element> / kMmaK;

// The operand at step k; load(registers, step in the tile) loads a fragment of it.
template <typename Element, int kCols, typename Load>
__device__ __forceinline__ MmaOperand<Element> load_operand(int k, const Load& load) {
  MmaOperand<Element> operand;
  if constexpr (kPartsOf<Element> == 3) {
    load(operand.high, k);
    load(operand.middle, k + kStepsOf<Element, kCols>);
    load(operand.low, k + 2 * kStepsOf<Element, kCols>);
  } else {
    load(operand.value, k);
  }
  return operand;
}

// body(j, a, n, b) for all steps along the columns of `rows` and of a tile of 8 kN rows, j counting those of an
// unrolled group: a are the operands of the 16 kM rows, b that of the fragments n and n + 1 of the tile.
template <typename Element, int kCols, int kN, int kM, typename Fragments, typename Body>
__device__ __forceinline__ void for_each_operands(const Fragments (&rows)[kM], uint32_t s_tile, const Body& body) {
  static_assert(kN % 2 == 0, "an operand B holds two fragments");
  constexpr int kSteps = kStepsOf<Element, kCols>, kUnroll = kSteps < Fragments::kUnroll ? kSteps : Fragments::kUnroll;
#pragma unroll 1
  for (int begin = 0; begin < kSteps; begin += kUnroll) {
    const int first = kUnroll % kStepsPerSwizzle == 0 ? begin : 0;  // steps by which tiles are shifted
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int k = begin - first + j;
      // NOTE: lets no load of this step move up to those before: operands of several steps at once would spill
      // registers.
      if constexpr (kPartsOf<Element> > 1) __syncwarp();
      MmaOperand<Element> a[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        a[i] = load_operand<Element, kCols>(
            k, [&](uint32_t (&fragment)[4], int step) { rows[i].get(fragment, first, step); });
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        const auto b = load_operand<Element, kCols>(k, [&](uint32_t (&fragment)[4], int step) {
          load_b<kCols>(fragment, s_tile + first * kStepBytes, n * kMmaN, step);
        });
        body(j, a, n, b);
      }
    }
  }
}

// acc (16 kM x 8 kN) = A * tile^T, for a tile of 8 kN rows and kCols columns. Each fragment of the tile feeds kM rows
// of fragments.
template <typename Element, int kCols, int kM, int kN, typename Fragments>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kM][kN][4], const Fragments (&rows)[kM],
                                                    uint32_t s_tile) {
#pragma unroll
  for (int i = 0; i < kM; ++i) clear(acc[i]);
  if constexpr (kPartsOf<Element> == 1) {
    for_each_operands<Element, kCols, kN>(rows, s_tile, [&](int, const auto& a, int n, const auto& b) {
#pragma unroll
      for (int i = 0; i < kM; ++i) multiply_add(acc[i][n], acc[i][n + 1], a[i], b);
    });
  } else {
    constexpr int kLargeSteps = 2;
    static_assert(kStepsOf<Element, kCols> % kLargeSteps == 0 && Fragments::kUnroll % kLargeSteps == 0,
                  "no step is left");
    float small[kM][kN][4], large[kM][kN][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) clear(small[i]);
    for_each_operands<Element, kCols, kN>(rows, s_tile, [&](int j, const auto& a, int n, const auto& b) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int m = n; m < n + 2; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) large[i][m][e] = j % kLargeSteps == 0 ? 0.0f : large[i][m][e];
        }
        multiply_add_small(small[i][n], small[i][n + 1], a[i], b);
        multiply_add_large(large[i][n], large[i][n + 1], a[i], b);
        if (j % kLargeSteps < kLargeSteps - 1) continue;
        add(acc[i][n], large[i][n]);
        add(acc[i][n + 1], large[i][n + 1]);
      }
    });
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int n = 0; n < kN; ++n) add(acc[i][n], small[i][n]);
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

// 16 rows and 16 columns of a tile.
template <typename Element, int kCols>
__device__ __forceinline__ MmaOperand<Element> operand_b_of_columns(uint32_t s_tile, int first_row, int first_col) {
  return load_operand<Element, kCols>(first_col / kMmaK, [&](uint32_t (&fragment)[4], int step) {
    load_b_transposed<kCols>(fragment, s_tile, first_row, step * kMmaK / kMmaN);
  });
}

// acc (16 kM x 8 kN) += left (16 kM x 16) * 16 rows of the tile from first_row on, 8 kN columns from first_col on.
template <typename Element, int kCols, int kM, int kN>
__device__ __forceinline__ void multiply_add(float (&acc)[kM][kN][4], const MmaOperand<Element> (&left)[kM],
                                             uint32_t s_tile, int first_row, int first_col) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    if constexpr (kPartsOf<Element> > 1) __syncwarp();  // as in multiply_transposed()
    const auto b = operand_b_of_columns<Element, kCols>(s_tile, first_row, first_col + n * kMmaN);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      multiply_add(acc[i][n], acc[i][n + 1], left[i], b);
    }
  }
}

// acc += left * tile, other_acc += other_left * tile, 16 rows each: the two share each fragment of the tile's 16 rows
// from first_row on, 8 kN columns from first_col on.
template <typename Element, int kCols, int kN>
__device__ __forceinline__ void multiply_add_both(float (&acc)[kN][4], const MmaOperand<Element>& left,
                                                  float (&other_acc)[kN][4], const MmaOperand<Element>& other_left,
                                                  uint32_t s_tile, int first_row, int first_col) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    if constexpr (kPartsOf<Element> > 1) __syncwarp();
    const auto b = operand_b_of_columns<Element, kCols>(s_tile, first_row, first_col + n * kMmaN);
    multiply_add(acc[n], acc[n + 1], left, b);
    if constexpr (kPartsOf<Element> > 1) __syncwarp();
    multiply_add(other_acc[n], other_acc[n + 1], other_left, b);
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
