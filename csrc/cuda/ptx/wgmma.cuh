// acc = A B (+ acc) on the tensor cores, one warpgroup (128 threads), asynchronous, float accumulators (sm_90a).
// PTX ISA: "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions: wgmma".
//
// M = 64, K = 16, bf16 or fp16. B comes from shared memory, A from shared memory (ss) or registers (rs). Fragments:
// warp w of the warpgroup holds rows 16 w .. 16 w + 15; inside, with group = lane / 4 and quad = lane % 4,
//   acc[i]: row group + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * quad + i % 2;   a[i]: as in mma.cuh
//
// The order in which it is used:  fence, wgmma ..., commit, [other work], wait<n>. Accumulators are untouchable from
// the wgmma to the wait. The wrappers take their accumulators by the array's size: float[N / 2] selects N.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <ptx_macro.cuh>
#include <type_traits>

namespace adasplash2::ptx {

// Which index of an operand tile in shared memory is contiguous.
enum class Major : int { kK = 0, kMn = 1 };

// How TMA and wgmma scatter rows over the banks; the values are the descriptor's layout type.
enum class Swizzle : int { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// PTX ISA: "Matrix Descriptor Format". The period of a swizzled tile is 8 rows of S = 128, 64 or 32 bytes.
//   K major:   stride_bytes from 8 rows to the next 8 rows (8 S when dense); leading_bytes unused
//   MN major:  leading_bytes from S / 2 rows (a chunk) to the next chunk, stride_bytes from 8 k to the next 8 k (8 S)
static __device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes,
                                                            uint32_t stride_bytes, Swizzle swizzle) {
  constexpr uint32_t kMask = 0x3ffff;  // the fields hold 14 bits of address / 16
  return static_cast<uint64_t>((address & kMask) >> 4) | static_cast<uint64_t>((leading_bytes & kMask) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & kMask) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// The descriptor of the same layout `bytes` (a multiple of 16) further on. Shared memory ends below 2^18 bytes, so the
// address field does not overflow: one 32-bit addition.
static __device__ __forceinline__ uint64_t wgmma_descriptor_at(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xffffffff00000000ull) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// Orders this warp's register writes before the wgmma that follow: before the first, and after touching accumulators.
static __device__ __forceinline__ void wgmma_fence() { PTX_MEMORY("wgmma.fence.sync.aligned;", (), ()); }

static __device__ __forceinline__ void wgmma_commit() { PTX_MEMORY("wgmma.commit_group.sync.aligned;", (), ()); }

// Waits until at most kPending of the newest groups are in flight.
template <int kPending>
static __device__ __forceinline__ void wgmma_wait() {
  PTX_MEMORY("wgmma.wait_group.sync.aligned %0;", (), (PTX_IN_N(kPending)));
}

// No instruction: keeps the compiler from moving accesses of the accumulators across this point. Before the first wgmma
// of a batch and after the wait for it; without it ptxas finds accumulators touched in flight and serialises (C7514).
template <int kSize>
static __device__ __forceinline__ void wgmma_pin(float (&acc)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) PTX_PIN(acc[i]);
}

// Register lists. TEXT_n is "%0, ... %n-1", ACC_n the operands acc[0] ... acc[n-1].
#define WGMMA_TEXT_32                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_TEXT_48 WGMMA_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_TEXT_64 WGMMA_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_TEXT_96                                                                                           \
  WGMMA_TEXT_64                                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_TEXT_128                                                                                         \
  WGMMA_TEXT_96                                                                                                \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_ACC_8(i)                                                                            \
  PTX_INOUT_F(acc[i]), PTX_INOUT_F(acc[i + 1]), PTX_INOUT_F(acc[i + 2]), PTX_INOUT_F(acc[i + 3]), \
      PTX_INOUT_F(acc[i + 4]), PTX_INOUT_F(acc[i + 5]), PTX_INOUT_F(acc[i + 6]), PTX_INOUT_F(acc[i + 7])
#define WGMMA_ACC_32 WGMMA_ACC_8(0), WGMMA_ACC_8(8), WGMMA_ACC_8(16), WGMMA_ACC_8(24)
#define WGMMA_ACC_48 WGMMA_ACC_32, WGMMA_ACC_8(32), WGMMA_ACC_8(40)
#define WGMMA_ACC_64 WGMMA_ACC_48, WGMMA_ACC_8(48), WGMMA_ACC_8(56)
#define WGMMA_ACC_96 WGMMA_ACC_64, WGMMA_ACC_8(64), WGMMA_ACC_8(72), WGMMA_ACC_8(80), WGMMA_ACC_8(88)
#define WGMMA_ACC_128 WGMMA_ACC_96, WGMMA_ACC_8(96), WGMMA_ACC_8(104), WGMMA_ACC_8(112), WGMMA_ACC_8(120)

// One instruction each. The operands that follow the accumulators are numbered in the text by r0 = "REGISTERS", r1, ...
// clang-format off
#define WGMMA_SS(N, REGISTERS, TYPE, r0, r1, r2, r3, r4)                                                        \
  PTX_MEMORY("{.reg .pred p;\n"                                                                                 \
             "setp.ne.b32 p, %" r2 ", 0;\n"                                                                     \
             "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_TEXT_##REGISTERS "}, "  \
             "%" r0 ", %" r1 ", p, 1, 1, %" r3 ", %" r4 ";}",                                                   \
             (WGMMA_ACC_##REGISTERS),                                                                           \
             (PTX_IN_L(a_descriptor), PTX_IN_L(b_descriptor), PTX_IN_R(static_cast<int>(accumulate)),           \
              PTX_IN_N(static_cast<int>(kMajorA)), PTX_IN_N(static_cast<int>(kMajorB))))
#define WGMMA_RS(N, REGISTERS, TYPE, r0, r1, r2, r3, r4, r5, r6)                                                \
  PTX_MEMORY("{.reg .pred p;\n"                                                                                 \
             "setp.ne.b32 p, %" r5 ", 0;\n"                                                                     \
             "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_TEXT_##REGISTERS "}, "  \
             "{%" r0 ", %" r1 ", %" r2 ", %" r3 "}, %" r4 ", p, 1, 1, %" r6 ";}",                               \
             (WGMMA_ACC_##REGISTERS),                                                                           \
             (PTX_IN_R(a[0]), PTX_IN_R(a[1]), PTX_IN_R(a[2]), PTX_IN_R(a[3]), PTX_IN_L(b_descriptor),           \
              PTX_IN_R(static_cast<int>(accumulate)), PTX_IN_N(static_cast<int>(kMajorB))))
// clang-format on

// wgmma_ss<Element, A's major, B's major>(acc, A, B, accumulate) and wgmma_rs<Element, B's major>(acc, a, B,
// accumulate); accumulate = false ignores what acc held.
#define WGMMA_DEFINE(N, REGISTERS, r0, r1, r2, r3, r4, r5, r6)                                                        \
  template <typename Element, Major kMajorA, Major kMajorB>                                                           \
  static __device__ __forceinline__ void wgmma_ss(float (&acc)[REGISTERS], uint64_t a_descriptor,                     \
                                                  uint64_t b_descriptor, bool accumulate) {                           \
    static_assert(std::is_same_v<Element, __nv_bfloat16> || std::is_same_v<Element, __half>, "16-bit elements only"); \
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                                                           \
      WGMMA_SS(N, REGISTERS, "bf16", r0, r1, r2, r3, r4);                                                             \
    } else {                                                                                                          \
      WGMMA_SS(N, REGISTERS, "f16", r0, r1, r2, r3, r4);                                                              \
    }                                                                                                                 \
  }                                                                                                                   \
  template <typename Element, Major kMajorB>                                                                          \
  static __device__ __forceinline__ void wgmma_rs(float (&acc)[REGISTERS], const uint32_t (&a)[4],                    \
                                                  uint64_t b_descriptor, bool accumulate) {                           \
    static_assert(std::is_same_v<Element, __nv_bfloat16> || std::is_same_v<Element, __half>, "16-bit elements only"); \
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                                                           \
      WGMMA_RS(N, REGISTERS, "bf16", r0, r1, r2, r3, r4, r5, r6);                                                     \
    } else {                                                                                                          \
      WGMMA_RS(N, REGISTERS, "f16", r0, r1, r2, r3, r4, r5, r6);                                                      \
    }                                                                                                                 \
  }

WGMMA_DEFINE(64, 32, "32", "33", "34", "35", "36", "37", "38")
WGMMA_DEFINE(96, 48, "48", "49", "50", "51", "52", "53", "54")
WGMMA_DEFINE(128, 64, "64", "65", "66", "67", "68", "69", "70")
WGMMA_DEFINE(192, 96, "96", "97", "98", "99", "100", "101", "102")
WGMMA_DEFINE(256, 128, "128", "129", "130", "131", "132", "133", "134")

#undef WGMMA_DEFINE
#undef WGMMA_RS
#undef WGMMA_SS
#undef WGMMA_ACC_128
#undef WGMMA_ACC_96
#undef WGMMA_ACC_64
#undef WGMMA_ACC_48
#undef WGMMA_ACC_32
#undef WGMMA_ACC_8
#undef WGMMA_TEXT_128
#undef WGMMA_TEXT_96
#undef WGMMA_TEXT_64
#undef WGMMA_TEXT_48
#undef WGMMA_TEXT_32

}  // namespace adasplash2::ptx
