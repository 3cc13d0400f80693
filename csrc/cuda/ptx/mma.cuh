// acc += A B on the tensor cores, one warp, float accumulators (sm_80).
// PTX ISA: "Warp-level matrix instructions: mma", fragments of m16n8k16 (bf16, fp16) and m16n8k8 (tf32).
//
// With group = lane / 4 and quad = lane % 4, in both shapes:
//   acc[i]: row group + 8 * (i / 2), column 2 * quad + i % 2
// m16n8k16, two 16-bit elements a register, the lower index in the lower half:
//   a[i]:   row group + 8 * (i % 2), columns 2 * quad + 8 * (i / 2) and + 1      b0, b1: column group, rows 2 * quad (+
//   8) and + 1
// m16n8k8, one tf32 (a float whose low 13 bits are not read) a register:
//   a[i]:   row group + 8 * (i % 2), column quad + 4 * (i / 2)                   b0, b1: column group, row quad (+ 4)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <ptx_macro.cuh>
#include <type_traits>

namespace adasplash2::ptx {

static __device__ __forceinline__ void mma_m16n8k16_bf16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                                         uint32_t b1) {
  PTX("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};",
      (PTX_INOUT_F(acc[0]), PTX_INOUT_F(acc[1]), PTX_INOUT_F(acc[2]), PTX_INOUT_F(acc[3])),
      (PTX_IN_R(a[0]), PTX_IN_R(a[1]), PTX_IN_R(a[2]), PTX_IN_R(a[3]), PTX_IN_R(b0), PTX_IN_R(b1)));
}

static __device__ __forceinline__ void mma_m16n8k16_f16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                                        uint32_t b1) {
  PTX("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};",
      (PTX_INOUT_F(acc[0]), PTX_INOUT_F(acc[1]), PTX_INOUT_F(acc[2]), PTX_INOUT_F(acc[3])),
      (PTX_IN_R(a[0]), PTX_IN_R(a[1]), PTX_IN_R(a[2]), PTX_IN_R(a[3]), PTX_IN_R(b0), PTX_IN_R(b1)));
}

static __device__ __forceinline__ void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                                        uint32_t b1) {
  PTX("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};",
      (PTX_INOUT_F(acc[0]), PTX_INOUT_F(acc[1]), PTX_INOUT_F(acc[2]), PTX_INOUT_F(acc[3])),
      (PTX_IN_R(a[0]), PTX_IN_R(a[1]), PTX_IN_R(a[2]), PTX_IN_R(a[3]), PTX_IN_R(b0), PTX_IN_R(b1)));
}

// The 16-bit product of kernels that are templates over the element type.
template <typename Element>
static __device__ __forceinline__ void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<Element, __nv_bfloat16> || std::is_same_v<Element, __half>, "16-bit elements only");
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    mma_m16n8k16_bf16(acc, a, b0, b1);
  } else {
    mma_m16n8k16_f16(acc, a, b0, b1);
  }
}

}  // namespace adasplash2::ptx
