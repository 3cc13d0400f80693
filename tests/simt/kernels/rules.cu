// One small kernel for each rule that the emulator enforces: what breaks it, and next to it what is legal.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <dynamic_smem.cuh>
#include <launch_kernel.cuh>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/ptx/wgmma.cuh"

using namespace adasplash2;

namespace {

constexpr unsigned kAll = 0xffffffffu;

float* smem_floats() { return reinterpret_cast<float*>(dynamic_smem()); }

// ---- order within a warp ----

__global__ void missing_syncwarp(float* out) {
  float* s_value = smem_floats();
  s_value[threadIdx.x] = 0.0f;
  __syncwarp();
  s_value[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = s_value[threadIdx.x ^ 1];
}

__global__ void syncwarp_orders(float* out) {
  float* s_value = smem_floats();
  s_value[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = s_value[threadIdx.x ^ 1];
}

__global__ void shuffle_orders_nothing(float* out) {
  float* s_value = smem_floats();
  s_value[threadIdx.x] = static_cast<float>(threadIdx.x);
  const int partner = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
  out[threadIdx.x] = s_value[partner];
}

__global__ void half_warp_syncs(float* out) {  // each half under a mask of its own
  float* s_value = smem_floats();
  s_value[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp(threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = s_value[threadIdx.x ^ 1];
}

// ---- order within a block ----

__global__ void writers_of_one_word(float* out) {
  float* s_value = smem_floats();
  if (threadIdx.x % 32 == 0) *s_value = 1.0f;
  __syncthreads();
  out[threadIdx.x] = *s_value;
}

__global__ void neighbouring_bytes(float* out) {  // threads may write adjacent bytes of a word
  uint8_t* s_byte = dynamic_smem();
  s_byte[threadIdx.x] = static_cast<uint8_t>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = s_byte[blockDim.x - 1 - threadIdx.x];
}

__global__ void overlapping_bytes(float* out) {  // a word over another thread's byte
  uint8_t* s_byte = dynamic_smem();
  if (threadIdx.x == 5) s_byte[2] = 1;
  if (threadIdx.x == 40) *reinterpret_cast<uint32_t*>(s_byte) = 0;
  __syncthreads();
  out[threadIdx.x] = s_byte[2];
}

__global__ void read_then_write(float* out) {
  float* s_value = smem_floats();
  s_value[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = s_value[0];
  if (threadIdx.x == 63) s_value[0] = 2.0f;
}

__global__ void atomics_then_plain_read(float* out) {
  unsigned* s_count = reinterpret_cast<unsigned*>(dynamic_smem());
  if (threadIdx.x == 0) *s_count = 0;
  __syncthreads();
  atomicAdd(s_count, 1u);
  out[threadIdx.x] = static_cast<float>(*s_count);
}

__global__ void atomics_then_barrier(float* out) {
  unsigned* s_count = reinterpret_cast<unsigned*>(dynamic_smem());
  if (threadIdx.x == 0) *s_count = 0;
  __syncthreads();
  atomicAdd(s_count, 1u);
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(*s_count);
}

__global__ void unwritten_read(float* out) { out[threadIdx.x] = smem_floats()[threadIdx.x]; }

// Warp 0 hands over to warp 1 through a named barrier that it does not wait at.
__global__ void arrive_and_sync(float* out) {
  float* s_value = smem_floats();
  if (threadIdx.x < 32) {
    s_value[threadIdx.x] = 1.0f;
    ptx::barrier_arrive<1, 64>();
  } else {
    ptx::barrier_sync<1, 64>();
    out[threadIdx.x] = s_value[threadIdx.x - 32];
  }
}

__global__ void write_after_arrive(float* out) {
  float* s_value = smem_floats();
  if (threadIdx.x < 32) {
    s_value[threadIdx.x] = 1.0f;
    ptx::barrier_arrive<1, 64>();
    s_value[threadIdx.x] = 2.0f;
  } else {
    ptx::barrier_sync<1, 64>();
    out[threadIdx.x] = s_value[threadIdx.x - 32];
  }
}

__global__ void different_barriers(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    ptx::barrier_sync<1, 64>();
  }
}

__global__ void different_counts(float*) {
  if (threadIdx.x < 32) {
    ptx::barrier_sync<1, 64>();
  } else {
    ptx::barrier_sync<1, 32>();
  }
}

__global__ void exit_before_barrier(float* out) {  // __syncthreads waits for the threads that are left
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

// ---- warp operations ----

__global__ void divergent_mma(float* out) {
  float acc[4] = {};
  const uint32_t a[4] = {};
  if (threadIdx.x % 2 == 0) {
    ptx::mma_m16n8k16_bf16(acc, a, 0, 0);
  } else {
    ptx::mma_m16n8k16_bf16(acc, a, 0, 0);
  }
  out[threadIdx.x] = acc[0];
}

__global__ void different_shuffles(float* out) {
  const float value = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = threadIdx.x % 2 == 0 ? __shfl_xor_sync(kAll, value, 2) : __shfl_down_sync(kAll, value, 2);
}

__global__ void lane_outside_its_mask(float* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0); }

__global__ void misaligned_ldmatrix(float* out) {
  float* s_value = smem_floats();
  s_value[threadIdx.x] = 0.0f;
  __syncthreads();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(s_value) + 8 * (threadIdx.x % 8));
  out[threadIdx.x] = static_cast<float>(r[0]);
}

// ---- bounds ----

__global__ void shared_out_of_bounds(float*) { smem_floats()[1024 + threadIdx.x] = 1.0f; }

__global__ void copy_out_of_bounds(float* out) {
  ptx::cp_async_16(ptx::shared_address(dynamic_smem()) + 16 * threadIdx.x, out + 4 * (threadIdx.x + 1), 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

__global__ void copy_of_nothing(float* out) {  // zero source bytes: the address is not read
  ptx::cp_async_16(ptx::shared_address(dynamic_smem()) + 16 * threadIdx.x, out + 4000, 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[threadIdx.x] = smem_floats()[4 * threadIdx.x];
}

int consume_stack(int depth, volatile char* above) {
  volatile char frame[1024];
  frame[0] = above[0];
  return depth == 0 ? frame[0] : consume_stack(depth - 1, frame) + frame[0];
}
__global__ void stack_overflow(float* out) {
  volatile char start = 1;
  out[threadIdx.x] = static_cast<float>(consume_stack(1 << 20, &start));
}

__global__ void wild_pointer(float*) { *reinterpret_cast<float*>(uintptr_t{8} + 64 * threadIdx.x) = 1.0f; }

// ---- asynchronous copies ----

// The newest group may still be in flight.
__global__ void wait_leaves_one_group(float* out) {
  const float* s_value = smem_floats();
  const uint32_t s_mine = ptx::shared_address(s_value) + 16 * threadIdx.x;
  ptx::cp_async_16(s_mine, out, 16);
  ptx::cp_async_commit();
  ptx::cp_async_16(s_mine + 16 * blockDim.x, out, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  out[threadIdx.x] = s_value[4 * threadIdx.x + 4 * blockDim.x];
  ptx::cp_async_wait<0>();
}

__global__ void uncommitted_copy(float* out) {
  ptx::cp_async_16(ptx::shared_address(dynamic_smem()) + 16 * threadIdx.x, out, 16);
  ptx::cp_async_wait<0>();
  out[threadIdx.x] = smem_floats()[4 * threadIdx.x];
}

// ---- mbarriers ----

__device__ __forceinline__ uint32_t make_mbarrier(int num_arrivals) {
  const uint32_t barrier = ptx::shared_address(dynamic_smem());
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, num_arrivals);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  return barrier;
}

__global__ void too_many_arrivals(float*) {
  const uint32_t barrier = make_mbarrier(40);
  ptx::mbarrier_expect_tx(barrier, 16);  // keeps the phase from ending
  ptx::mbarrier_arrive(barrier);
}

__global__ void wrong_parity(float*) {
  const uint32_t barrier = make_mbarrier(static_cast<int>(blockDim.x));
  ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_wait(barrier, 0);
  ptx::mbarrier_wait(barrier, 1);
  ptx::mbarrier_wait(barrier, 0);
}

__global__ void endless_polling(float*) {
  const uint32_t barrier = make_mbarrier(1);
  while (!ptx::mbarrier_test_wait(barrier, 0)) {
  }
}

__global__ void no_mbarrier(float*) { ptx::mbarrier_arrive(ptx::shared_address(dynamic_smem())); }

__global__ void double_init(float*) {
  make_mbarrier(1);
  make_mbarrier(1);
}

__global__ void arrive_releases(float* out) {
  const uint32_t barrier = make_mbarrier(32);
  float* s_value = smem_floats() + 16;
  if (threadIdx.x < 32) {
    s_value[threadIdx.x] = 1.0f;
    ptx::mbarrier_arrive(barrier);
  } else {
    ptx::mbarrier_wait(barrier, 0);
    out[threadIdx.x] = s_value[threadIdx.x - 32];
  }
}

// ---- wgmma ----

// Two tiles [64, 16] in 8x8 core matrices without swizzle, all ones; the descriptor is the first one's.
constexpr uint64_t kNextTile = 64 * 16 * 2 >> 4;  // in a descriptor's units
template <bool kFences>
__device__ __forceinline__ uint64_t make_operands() {
  uint8_t* smem = dynamic_smem();
  for (int i = threadIdx.x; i < 2 * 64 * 16; i += blockDim.x) reinterpret_cast<uint16_t*>(smem)[i] = 0x3f80;
  if (kFences) ptx::fence_proxy_async();
  __syncthreads();
  return ptx::wgmma_descriptor(ptx::shared_address(smem), 128, 256, ptx::Swizzle::kNone);
}

template <bool kFences>
__global__ void wgmma_of_ordinary_writes(float* out) {
  const uint64_t tile = make_operands<kFences>();
  float acc[32];
  ptx::wgmma_fence();
  ptx::wgmma_ss<__nv_bfloat16, ptx::Major::kK, ptx::Major::kK>(acc, tile, tile, false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = acc[5];
}

constexpr auto wgmma_with_fence = &wgmma_of_ordinary_writes<true>;
constexpr auto wgmma_without_fence = &wgmma_of_ordinary_writes<false>;

__global__ void accumulators_written(float* out) {
  const uint64_t tile = make_operands<true>();
  float acc[32];
  ptx::wgmma_fence();
  ptx::wgmma_ss<__nv_bfloat16, ptx::Major::kK, ptx::Major::kK>(acc, tile, tile, false);
  ptx::wgmma_commit();
  for (float& value : acc) value = 2.0f;
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = acc[5];
}

__global__ void operands_overwritten(float* out) {
  const uint64_t tile = make_operands<true>();
  float acc[32];
  ptx::wgmma_fence();
  ptx::wgmma_ss<__nv_bfloat16, ptx::Major::kK, ptx::Major::kK>(acc, tile, tile, false);
  ptx::wgmma_commit();
  smem_floats()[threadIdx.x] = 0.0f;
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = acc[5];
}

__global__ void different_wgmma(float* out) {
  const uint64_t tile = make_operands<true>();
  const bool is_second = __shfl_sync(kAll, static_cast<int>(threadIdx.x), 0) >= 64;
  float acc[32];
  ptx::wgmma_fence();
  ptx::wgmma_ss<__nv_bfloat16, ptx::Major::kK, ptx::Major::kK>(acc, tile, tile + (is_second ? kNextTile : 0), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = acc[5];
}

__global__ void wgmma_never_waited_for(float*) {
  const uint64_t tile = make_operands<true>();
  float acc[32];
  ptx::wgmma_fence();
  ptx::wgmma_ss<__nv_bfloat16, ptx::Major::kK, ptx::Major::kK>(acc, tile, tile, false);
  ptx::wgmma_commit();
}

// ---- PTX that no wrapper would hold ----

__global__ void unknown_instruction(float*) { PTX("fence.proxy.async.shared::block;", (), ()); }

__global__ void operand_of_wrong_kind(float* out) {
  const uint32_t destination = ptx::shared_address(dynamic_smem());
  PTX("cp.async.cg.shared.global [%1], [%0], 16, %2;", (), (PTX_IN_R(destination), PTX_IN_L(out), PTX_IN_R(16)));
}

__global__ void operand_forgotten(float*) {
  const uint32_t destination = ptx::shared_address(dynamic_smem());
  PTX("mbarrier.arrive.shared::cta.b64 _, [%0];", (), (PTX_IN_R(destination), PTX_IN_R(64)));
}

__global__ void operand_missing(float*) { PTX("bar.sync %0, %1;", (), (PTX_IN_N(1))); }

__global__ void register_undeclared(float* out) {
  PTX("{.reg .pred p;\nelect.sync _|q, 0xffffffff;\nselp.u32 %0, 1, 0, p;}", (PTX_OUT_R(out[0])), ());
}

}  // namespace

#define ENTRY(kernel, threads, smem_bytes)                                                                \
  extern "C" int run_##kernel(float* out) {                                                               \
    return simt::entry([&] { launch_kernel(kernel, dim3(1), dim3(threads), smem_bytes, nullptr, out); }); \
  }

ENTRY(missing_syncwarp, 32, 128)
ENTRY(syncwarp_orders, 32, 128)
ENTRY(shuffle_orders_nothing, 32, 128)
ENTRY(half_warp_syncs, 32, 128)
ENTRY(writers_of_one_word, 64, 4)
ENTRY(neighbouring_bytes, 64, 64)
ENTRY(overlapping_bytes, 64, 4)
ENTRY(read_then_write, 64, 256)
ENTRY(atomics_then_plain_read, 64, 4)
ENTRY(atomics_then_barrier, 64, 4)
ENTRY(unwritten_read, 32, 128)
ENTRY(arrive_and_sync, 64, 128)
ENTRY(write_after_arrive, 64, 128)
ENTRY(different_barriers, 64, 0)
ENTRY(different_counts, 64, 0)
ENTRY(exit_before_barrier, 64, 0)
ENTRY(divergent_mma, 32, 0)
ENTRY(different_shuffles, 32, 0)
ENTRY(lane_outside_its_mask, 32, 0)
ENTRY(misaligned_ldmatrix, 32, 256)
ENTRY(shared_out_of_bounds, 32, 4096)
ENTRY(copy_out_of_bounds, 64, 1024)
ENTRY(copy_of_nothing, 64, 1024)
ENTRY(stack_overflow, 32, 0)
ENTRY(wild_pointer, 32, 0)
ENTRY(wait_leaves_one_group, 32, 1024)
ENTRY(uncommitted_copy, 32, 512)
ENTRY(too_many_arrivals, 64, 64)
ENTRY(wrong_parity, 32, 64)
ENTRY(endless_polling, 32, 64)
ENTRY(no_mbarrier, 32, 64)
ENTRY(double_init, 32, 64)
ENTRY(arrive_releases, 64, 256)
ENTRY(wgmma_with_fence, 128, 4096)
ENTRY(wgmma_without_fence, 128, 4096)
ENTRY(accumulators_written, 128, 4096)
ENTRY(operands_overwritten, 128, 4096)
ENTRY(different_wgmma, 128, 4096)
ENTRY(wgmma_never_waited_for, 128, 4096)
ENTRY(unknown_instruction, 32, 0)
ENTRY(operand_of_wrong_kind, 32, 16)
ENTRY(operand_forgotten, 32, 16)
ENTRY(operand_missing, 32, 0)
ENTRY(register_undeclared, 32, 0)
