// The parts of <cuda_runtime.h> that kernels and their launchers use, for g++ and the emulator.
#pragma once

#include <simt_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

// ---- qualifiers ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
// Kernels use dynamic_smem() alone: variables of the compiler's would lie outside the shadow memory.
#define __shared__ static_assert(false, "use adasplash2::dynamic_smem() instead of __shared__");

// ---- vector types ----

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- arithmetic ----
//
// PTX ISA: "Floating Point Instructions", "Integer Arithmetic Instructions", cvt. Approximate functions are exact here.

using std::max;
using std::min;

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fmaf(x, y, z); }

// x * y + z rounded towards minus infinity. The product is exact in double, the sum is sum + error (Knuth's two-sum).
inline float __fmaf_rd(float x, float y, float z) {
  const double product = static_cast<double>(x) * y;
  const double sum = product + z;
  const double z_part = sum - product;
  const double error = (product - (sum - z_part)) + (z - z_part);
  const float nearest = static_cast<float>(sum);
  const bool is_above = nearest > sum || (nearest == sum && error < 0);
  return is_above ? std::nextafterf(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}

// Out of range saturates and NaN gives 0, as cvt.s32.f32 does.
inline int simt_to_int(float rounded) {
  if (std::isnan(rounded)) return 0;
  if (rounded >= 2147483648.0f) return std::numeric_limits<int>::max();
  if (rounded < -2147483648.0f) return std::numeric_limits<int>::min();
  return static_cast<int>(rounded);
}
inline int __float2int_rd(float x) { return simt_to_int(std::floor(x)); }
inline int __float2int_ru(float x) { return simt_to_int(std::ceil(x)); }
inline int __float2int_rn(float x) { return simt_to_int(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return simt_to_int(std::trunc(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32); }
inline int __vimax3_s32(int x, int y, int z) { return std::max(std::max(x, y), z); }
inline int __vimin3_s32(int x, int y, int z) { return std::min(std::min(x, y), z); }

// ---- memory ----

template <typename T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}
__forceinline__ size_t __cvta_generic_to_shared(const void* pointer) { return simt::to_shared_address(pointer); }

// ---- warps ----
//
// PTX ISA: "Data Movement and Conversion Instructions: shfl.sync", and of "Parallel Synchronization and Communication
// Instructions": vote.sync, redux.sync, bar.warp.sync, activemask.

template <typename T>
__forceinline__ T simt_shuffle(simt::Shuffle kind, unsigned mask, T value, int lane_operand, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = simt::shuffle(kind, mask, bits, lane_operand, width);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return simt_shuffle(simt::Shuffle::kIndex, mask, value, lane, width);
}
template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return simt_shuffle(simt::Shuffle::kXor, mask, value, lane_mask, width);
}
template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt_shuffle(simt::Shuffle::kDown, mask, value, static_cast<int>(delta), width);
}
template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt_shuffle(simt::Shuffle::kUp, mask, value, static_cast<int>(delta), width);
}

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0); }
__forceinline__ int __any_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0) != 0; }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0) == mask; }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
__forceinline__ unsigned __activemask() { return simt::active_mask(); }

__forceinline__ unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(simt::reduce(simt::Reduction::kAdd, mask, value));
}
__forceinline__ int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(simt::reduce(simt::Reduction::kAdd, mask, value));
}
__forceinline__ unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(simt::reduce(simt::Reduction::kMax, mask, value));
}
__forceinline__ int __reduce_max_sync(unsigned mask, int value) {
  return static_cast<int>(simt::reduce(simt::Reduction::kMax, mask, value));
}
__forceinline__ unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(simt::reduce(simt::Reduction::kMin, mask, value));
}
__forceinline__ int __reduce_min_sync(unsigned mask, int value) {
  return static_cast<int>(simt::reduce(simt::Reduction::kMin, mask, value));
}
__forceinline__ unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(simt::reduce(simt::Reduction::kAnd, mask, value));
}
__forceinline__ unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(simt::reduce(simt::Reduction::kOr, mask, value));
}
__forceinline__ unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(simt::reduce(simt::Reduction::kXor, mask, value));
}

// ---- blocks ----
//
// PTX ISA: "Parallel Synchronization and Communication Instructions": bar, membar.

__forceinline__ void __syncthreads() { simt::sync_threads(); }
// One block runs at a time, on one host thread: fences have nothing to order that a barrier does not.
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] __forceinline__ void __trap() { simt::trap(); }

// ---- atomics ----
//
// PTX ISA: "Parallel Synchronization and Communication Instructions": atom, red.

using simt::Atomic;
__forceinline__ int atomicAdd(int* address, int value) { return simt::atomic_s32(Atomic::kAdd, address, value); }
__forceinline__ unsigned atomicAdd(unsigned* address, unsigned value) {
  return simt::atomic_u32(Atomic::kAdd, address, value);
}
__forceinline__ unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return simt::atomic_u64(Atomic::kAdd, reinterpret_cast<uint64_t*>(address), value);
}
__forceinline__ float atomicAdd(float* address, float value) { return simt::atomic_f32(Atomic::kAdd, address, value); }
__forceinline__ int atomicMax(int* address, int value) { return simt::atomic_s32(Atomic::kMax, address, value); }
__forceinline__ unsigned atomicMax(unsigned* address, unsigned value) {
  return simt::atomic_u32(Atomic::kMax, address, value);
}
__forceinline__ int atomicMin(int* address, int value) { return simt::atomic_s32(Atomic::kMin, address, value); }
__forceinline__ unsigned atomicMin(unsigned* address, unsigned value) {
  return simt::atomic_u32(Atomic::kMin, address, value);
}
__forceinline__ unsigned atomicAnd(unsigned* address, unsigned value) {
  return simt::atomic_u32(Atomic::kAnd, address, value);
}
__forceinline__ unsigned atomicOr(unsigned* address, unsigned value) {
  return simt::atomic_u32(Atomic::kOr, address, value);
}
__forceinline__ unsigned atomicXor(unsigned* address, unsigned value) {
  return simt::atomic_u32(Atomic::kXor, address, value);
}
__forceinline__ unsigned long long atomicOr(unsigned long long* address, unsigned long long value) {
  return simt::atomic_u64(Atomic::kOr, reinterpret_cast<uint64_t*>(address), value);
}
__forceinline__ unsigned atomicExch(unsigned* address, unsigned value) {
  return simt::atomic_u32(Atomic::kExchange, address, value);
}
__forceinline__ unsigned atomicCAS(unsigned* address, unsigned expected, unsigned desired) {
  return simt::atomic_compare_and_swap(address, expected, desired);
}

// ---- host: the emulated device ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "out of memory";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A small device, so that a persistent kernel's blocks loop even in small tests.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 2;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = simt::compute_capability().major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = simt::compute_capability().minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 * 1024;
      break;
  }
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  *pointer = static_cast<T*>(simt::allocate_global(bytes));
  return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) {
  simt::free_global(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* destination, const void* source, size_t bytes, cudaMemcpyKind) {
  std::memcpy(destination, source, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t) {
  return cudaMemcpy(destination, source, bytes, kind);
}
inline cudaError_t cudaMemset(void* destination, int value, size_t bytes) {
  std::memset(destination, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* destination, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(destination, value, bytes);
}
