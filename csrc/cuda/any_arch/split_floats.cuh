// float32 for the tensor cores: every float becomes the sum of three bfloat16, all its 24 bits, once for all tiles that
// will hold it (tile/smem_layout.cuh, "FloatPart").
//
//   in   rows (B, H, N, dim) float, rows 16-byte aligned, dim a multiple of 8
//   out  parts (B, H, N, 3, dim) bfloat16: high, middle, low
//
// A thread takes 8 columns. Grid (blocks of threads over the rows of a head, H, B).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/problem.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/smem_layout.cuh"
#include "params.h"

namespace adasplash2::cuda {

struct SplitFloatsParams {
  int64_t num_rows;
  int dim;
  Rows rows;
  Rows parts;
};

constexpr int kSplitThreads = 256;
constexpr int kSplitCols = kChunkElements<FloatPart>;  // a thread's

static __global__ void __launch_bounds__(kSplitThreads) split_floats_kernel(const SplitFloatsParams params) {
  const int batch = blockIdx.z, head = blockIdx.y, threads_per_row = params.dim / kSplitCols;
  const int64_t index = int64_t(blockIdx.x) * kSplitThreads + threadIdx.x;
  const int64_t row = index / threads_per_row;
  const int col = static_cast<int>(index % threads_per_row) * kSplitCols;
  if (row >= params.num_rows) return;
  const float* g_floats = head_rows<const float>(params.rows, batch, head) + row * params.rows.stride_row + col;
  FloatPart* g_parts = head_rows<FloatPart>(params.parts, batch, head) + row * params.parts.stride_row + col;
  const float4 left = reinterpret_cast<const float4*>(g_floats)[0],
               right = reinterpret_cast<const float4*>(g_floats)[1];
  MmaOperand<float> parts;
  parts.split(0, left.x, left.y);
  parts.split(1, left.z, left.w);
  parts.split(2, right.x, right.y);
  parts.split(3, right.z, right.w);
  const auto store = [&](int part, const uint32_t (&value)[4]) {
    *reinterpret_cast<uint4*>(g_parts + part * params.dim) = make_uint4(value[0], value[1], value[2], value[3]);
  };
  store(0, parts.high);
  store(1, parts.middle);
  store(2, parts.low);
}

}  // namespace adasplash2::cuda
