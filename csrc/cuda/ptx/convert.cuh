// Float to the tensor cores' input formats, in registers.
// PTX ISA: "Data Movement and Conversion Instructions: cvt" (sm_80).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <ptx_macro.cuh>
#include <type_traits>

namespace adasplash2::ptx {

// Rounded to nearest, ties to even; `low` ends in bits 0-15.
static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  PTX("cvt.rn.bf16x2.f32 %0, %1, %2;", (PTX_OUT_R(packed)), (PTX_IN_F(high), PTX_IN_F(low)));
  return packed;
}

static __device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t packed;
  PTX("cvt.rn.f16x2.f32 %0, %1, %2;", (PTX_OUT_R(packed)), (PTX_IN_F(high), PTX_IN_F(low)));
  return packed;
}

// Of the larger of each number and zero; NaN stays NaN.
static __device__ __forceinline__ uint32_t pack_f16_relu(float low, float high) {
  uint32_t packed;
  PTX("cvt.rn.relu.f16x2.f32 %0, %1, %2;", (PTX_OUT_R(packed)), (PTX_IN_F(high), PTX_IN_F(low)));
  return packed;
}

template <typename Element>
static __device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<Element, __nv_bfloat16> || std::is_same_v<Element, __half>, "16-bit elements only");
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return pack_bf16(low, high);
  } else {
    return pack_f16(low, high);
  }
}

// Rounded to nearest, ties away from zero: the only rounding to tf32 that sm_80 has. The low 13 bits come out zero.
static __device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t rounded;
  PTX("cvt.rna.tf32.f32 %0, %1;", (PTX_OUT_R(rounded)), (PTX_IN_F(value)));
  return rounded;
}

}  // namespace adasplash2::ptx
