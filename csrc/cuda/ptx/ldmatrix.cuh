// 8x8 matrices of 16-bit elements between shared memory and a warp's registers.
// PTX ISA: "Warp-level matrix load instruction: ldmatrix" (sm_75), "Warp-level matrix store instruction: stmatrix"
// (sm_90).
//
// Lanes 8m .. 8m+7 give the addresses (16-byte aligned) of the 8 rows of matrix m. Afterwards register m of a lane
// holds
//   plain:  row lane / 4,  columns 2 * (lane % 4) and + 1   (the lower column in the lower half)
//   trans:  column lane / 4,  rows 2 * (lane % 4) and + 1
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <ptx_macro.cuh>

namespace adasplash2::ptx {

static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  PTX_MEMORY("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];",
             (PTX_OUT_R(r[0]), PTX_OUT_R(r[1]), PTX_OUT_R(r[2]), PTX_OUT_R(r[3])), (PTX_IN_R(row_address)));
}

static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) {
  PTX_MEMORY("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];",
             (PTX_OUT_R(r[0]), PTX_OUT_R(r[1]), PTX_OUT_R(r[2]), PTX_OUT_R(r[3])), (PTX_IN_R(row_address)));
}

static __device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t row_address) {
  PTX_MEMORY("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];", (PTX_OUT_R(r[0]), PTX_OUT_R(r[1])),
             (PTX_IN_R(row_address)));
}

static __device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row_address) {
  PTX_MEMORY("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];", (PTX_OUT_R(r[0]), PTX_OUT_R(r[1])),
             (PTX_IN_R(row_address)));
}

static __device__ __forceinline__ void stmatrix_x4(uint32_t row_address, const uint32_t (&r)[4]) {
  PTX_MEMORY("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};", (),
             (PTX_IN_R(row_address), PTX_IN_R(r[0]), PTX_IN_R(r[1]), PTX_IN_R(r[2]), PTX_IN_R(r[3])));
}

static __device__ __forceinline__ void stmatrix_x4_trans(uint32_t row_address, const uint32_t (&r)[4]) {
  PTX_MEMORY("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};", (),
             (PTX_IN_R(row_address), PTX_IN_R(r[0]), PTX_IN_R(r[1]), PTX_IN_R(r[2]), PTX_IN_R(r[3])));
}

}  // namespace adasplash2::ptx
