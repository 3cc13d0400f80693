// One kernel for each PTX wrapper and intrinsic, for test_sass.py: compiled by nvcc, never run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <dynamic_smem.cuh>
#include <tensor_map.cuh>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/max.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

using namespace adasplash2;

#define PROBE extern "C" __global__ void __launch_bounds__(128, 1)

// ---- sm_80 ----

PROBE probe_cp_async_16(const char* source, uint32_t s, int bytes) { ptx::cp_async_16(s, source, bytes); }
PROBE probe_cp_async_8(const char* source, uint32_t s, int bytes) { ptx::cp_async_8(s, source, bytes); }
PROBE probe_cp_async_4(const char* source, uint32_t s, int bytes) { ptx::cp_async_4(s, source, bytes); }
PROBE probe_cp_async_commit() { ptx::cp_async_commit(); }
PROBE probe_cp_async_wait() { ptx::cp_async_wait<1>(); }

template <typename Load, int kRegisters>
__device__ __forceinline__ void load_matrix(Load load, uint32_t (&r)[kRegisters], uint32_t* out) {
  load(r);
  for (int i = 0; i < kRegisters; ++i) out[i] = r[i];
}
#define PROBE_LOAD(name, registers)                                            \
  PROBE probe_##name(uint32_t s, uint32_t* out) {                              \
    uint32_t r[registers];                                                     \
    load_matrix([&](uint32_t (&to)[registers]) { ptx::name(to, s); }, r, out); \
  }
PROBE_LOAD(ldmatrix_x4, 4)
PROBE_LOAD(ldmatrix_x4_trans, 4)
PROBE_LOAD(ldmatrix_x2, 2)
PROBE_LOAD(ldmatrix_x2_trans, 2)

#define PROBE_MMA(name)                                              \
  PROBE probe_##name(float* acc_out, const uint32_t* in) {           \
    float acc[4] = {acc_out[0], acc_out[1], acc_out[2], acc_out[3]}; \
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};              \
    ptx::name(acc, a, in[4], in[5]);                                 \
    for (int i = 0; i < 4; ++i) acc_out[i] = acc[i];                 \
  }
PROBE_MMA(mma_m16n8k16_bf16)
PROBE_MMA(mma_m16n8k16_f16)
PROBE_MMA(mma_m16n8k8_tf32)

PROBE probe_pack_bf16(float a, float b, uint32_t* out) { out[0] = ptx::pack_bf16(a, b); }
PROBE probe_pack_f16(float a, float b, uint32_t* out) { out[0] = ptx::pack_f16(a, b); }
PROBE probe_pack_f16_relu(float a, float b, uint32_t* out) { out[0] = ptx::pack_f16_relu(a, b); }
PROBE probe_to_tf32(float a, uint32_t* out) { out[0] = ptx::to_tf32(a); }
PROBE probe_max_nan(float a, float b, float* out) { out[0] = ptx::max_nan(a, b); }
PROBE probe_barrier_sync() { ptx::barrier_sync<1, 64>(); }
PROBE probe_barrier_arrive() { ptx::barrier_arrive<1, 64>(); }

PROBE probe_shared_atomic_add(unsigned value) {
  atomicAdd(reinterpret_cast<unsigned*>(dynamic_smem()) + threadIdx.x % 7, value);
}
PROBE probe_shared_atomic_add_signed(int value) {
  atomicAdd(reinterpret_cast<int*>(dynamic_smem()) + threadIdx.x % 7, value);
}
PROBE probe_shared_atomic_max(int value) { atomicMax(reinterpret_cast<int*>(dynamic_smem()) + threadIdx.x % 7, value); }
PROBE probe_shared_atomic_or(unsigned value) {
  atomicOr(reinterpret_cast<unsigned*>(dynamic_smem()) + threadIdx.x % 7, value);
}
PROBE probe_global_atomic_add_float(float* out, float value) { atomicAdd(out + threadIdx.x % 7, value); }
PROBE probe_vimax3(int a, int b, int c, int* out) { out[0] = __vimax3_s32(a, b, c); }
PROBE probe_fmaf_rd(float a, float b, float c, float* out) { out[0] = __fmaf_rd(a, b, c); }

// ---- sm_90a ----

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

PROBE probe_stmatrix_x4(uint32_t s, const uint32_t* in) {
  const uint32_t r[4] = {in[0], in[1], in[2], in[3]};
  ptx::stmatrix_x4(s, r);
}
PROBE probe_stmatrix_x4_trans(uint32_t s, const uint32_t* in) {
  const uint32_t r[4] = {in[0], in[1], in[2], in[3]};
  ptx::stmatrix_x4_trans(s, r);
}
PROBE probe_mbarrier_init(uint32_t s) { ptx::mbarrier_init(s, 3); }
PROBE probe_mbarrier_inval(uint32_t s) { ptx::mbarrier_inval(s); }
PROBE probe_mbarrier_arrive(uint32_t s) { ptx::mbarrier_arrive(s); }
PROBE probe_mbarrier_arrive_expect_tx(uint32_t s, uint32_t bytes) { ptx::mbarrier_arrive_expect_tx(s, bytes); }
PROBE probe_mbarrier_expect_tx(uint32_t s, uint32_t bytes) { ptx::mbarrier_expect_tx(s, bytes); }
PROBE probe_mbarrier_test_wait(uint32_t s, int* out) { out[0] = ptx::mbarrier_test_wait(s, 0); }
PROBE probe_mbarrier_try_wait(uint32_t s, int* out) { out[0] = ptx::mbarrier_try_wait(s, 0); }
PROBE probe_mbarrier_wait(uint32_t s) { ptx::mbarrier_wait(s, 0); }
PROBE probe_fence_proxy_async() { ptx::fence_proxy_async(); }
PROBE probe_fence_mbarrier_init() { ptx::fence_mbarrier_init(); }
PROBE probe_elect_one(int* out) { out[0] = ptx::elect_one(); }
PROBE probe_setmaxnreg_increase() { ptx::setmaxnreg_increase<232>(); }
PROBE probe_setmaxnreg_decrease() { ptx::setmaxnreg_decrease<40>(); }

PROBE probe_tma_prefetch_descriptor(const __grid_constant__ TensorMap map) { ptx::tma_prefetch_descriptor(&map); }
PROBE probe_tma_load_2d(const __grid_constant__ TensorMap map, uint32_t s, uint32_t b) {
  ptx::tma_load(s, &map, b, 1, 2);
}
PROBE probe_tma_load_3d(const __grid_constant__ TensorMap map, uint32_t s, uint32_t b) {
  ptx::tma_load(s, &map, b, 1, 2, 3);
}
PROBE probe_tma_load_4d(const __grid_constant__ TensorMap map, uint32_t s, uint32_t b) {
  ptx::tma_load(s, &map, b, 1, 2, 3, 4);
}
PROBE probe_tma_load_5d(const __grid_constant__ TensorMap map, uint32_t s, uint32_t b) {
  ptx::tma_load(s, &map, b, 1, 2, 3, 4, 5);
}
PROBE probe_tma_store_2d(const __grid_constant__ TensorMap map, uint32_t s) { ptx::tma_store(&map, s, 1, 2); }
PROBE probe_tma_store_3d(const __grid_constant__ TensorMap map, uint32_t s) { ptx::tma_store(&map, s, 1, 2, 3); }
PROBE probe_tma_store_4d(const __grid_constant__ TensorMap map, uint32_t s) { ptx::tma_store(&map, s, 1, 2, 3, 4); }
PROBE probe_tma_store_5d(const __grid_constant__ TensorMap map, uint32_t s) { ptx::tma_store(&map, s, 1, 2, 3, 4, 5); }
PROBE probe_tma_reduce_add_2d(const __grid_constant__ TensorMap map, uint32_t s) { ptx::tma_reduce_add(&map, s, 1, 2); }
PROBE probe_tma_reduce_add_3d(const __grid_constant__ TensorMap map, uint32_t s) {
  ptx::tma_reduce_add(&map, s, 1, 2, 3);
}
PROBE probe_tma_reduce_add_4d(const __grid_constant__ TensorMap map, uint32_t s) {
  ptx::tma_reduce_add(&map, s, 1, 2, 3, 4);
}
PROBE probe_tma_store_commit() { ptx::tma_store_commit(); }
PROBE probe_tma_store_wait_read() { ptx::tma_store_wait_read<0>(); }
PROBE probe_tma_store_wait() { ptx::tma_store_wait<0>(); }

// With the fence, commit and wait that every wgmma needs.
template <int kRegisters, typename Issue>
__device__ __forceinline__ void multiply(Issue issue, float* out) {
  float acc[kRegisters];
  ptx::wgmma_fence();
  issue(acc);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) out[i * 128 + threadIdx.x] = acc[i];
}
#define PROBE_WGMMA(n, element, tag)                                                                                   \
  PROBE probe_wgmma_ss_n##n##_##tag(uint64_t a, uint64_t b, float* out) {                                              \
    multiply<n / 2>(                                                                                                   \
        [&](float (&acc)[n / 2]) { ptx::wgmma_ss<element, ptx::Major::kK, ptx::Major::kMn>(acc, a, b, false); }, out); \
  }                                                                                                                    \
  PROBE probe_wgmma_rs_n##n##_##tag(const uint32_t* in, uint64_t b, float* out) {                                      \
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};                                                                \
    multiply<n / 2>([&](float (&acc)[n / 2]) { ptx::wgmma_rs<element, ptx::Major::kK>(acc, a, b, false); }, out);      \
  }
PROBE_WGMMA(64, __nv_bfloat16, bf16)
PROBE_WGMMA(96, __nv_bfloat16, bf16)
PROBE_WGMMA(128, __nv_bfloat16, bf16)
PROBE_WGMMA(192, __nv_bfloat16, bf16)
PROBE_WGMMA(256, __nv_bfloat16, bf16)
PROBE_WGMMA(64, __half, f16)
PROBE_WGMMA(96, __half, f16)
PROBE_WGMMA(128, __half, f16)
PROBE_WGMMA(192, __half, f16)
PROBE_WGMMA(256, __half, f16)

#endif
