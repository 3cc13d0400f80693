// A small sm_90a kernel with one of everything, and the bugs that the emulator must find in it.
//
// score = scale * query key^T (float, to global memory), out = bf16(score) value (bf16, by TMA store), head
// dimension 64. Grid: (ceil(N / 128), heads), one block of a producer and two consumer warpgroups of 64 rows each. Keys
// and values come by TMA in tiles of 128 rows through a ring of two stages. Shared memory, all with the 128-byte
// swizzle: query [128, 64], key [2][128, 64], value [2][128, 64], then the mbarriers query_full, key_value_full[2],
// key_value_empty[2]. The out tile takes the query tile's place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <dynamic_smem.cuh>
#include <tensor_map.cuh>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace attention {

using namespace adasplash2;

enum class Bug : int {
  kNone,
  kNoFullWait,            // consumers do not wait for key and value
  kEarlyRelease,          // the stage is released before the wgmma that reads it is waited for
  kNoWgmmaWait,           // accumulators are read while the wgmma is in flight
  kNoWgmmaFence,          // wgmma.fence deleted
  kNoProxyFence,          // fence.proxy.async before the TMA store deleted
  kTooManyBytes,          // expect_tx announces 16 bytes more than come
  kTooFewBytes,           // expect_tx announces the key alone
  kMissingRelease,        // one warp does not release one stage
  kWrongBarrierCount,     // the named barrier waits for twice its threads
  kNoBarrierAfterInit,    // __syncthreads after mbarrier.init deleted
  kNoInitFence,           // fence.mbarrier_init deleted
  kWrongDescriptor,       // stride 512 instead of 1024 in the key's descriptor
  kNoBarrierBeforeStore,  // the named barrier before the TMA store deleted
  kNoStoreWait,           // the thread exits with its TMA store in flight
  kOneReleasePerGroup,    // legal: one arrival a warpgroup, and two expected
};

constexpr int kBlockM = 128, kBlockN = 128, kDim = 64, kStages = 2, kThreads = 384;
constexpr uint32_t kQueryBytes = kBlockM * kDim * 2, kTileBytes = kBlockN * kDim * 2;
constexpr uint32_t kKeyOffset = kQueryBytes, kValueOffset = kKeyOffset + kStages * kTileBytes;
constexpr uint32_t kBarrierOffset = kValueOffset + kStages * kTileBytes;
constexpr uint32_t kSmemBytes = kBarrierOffset + 64;

// A dense tile with rows of 128 bytes; stride_bytes from 8 rows (K major) or 8 k (MN major) to the next.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, uint32_t stride_bytes = 1024) {
  return ptx::wgmma_descriptor(address, 16, stride_bytes, ptx::Swizzle::k128);
}

__device__ __forceinline__ void produce(uint32_t smem, const TensorMap* query, const TensorMap* key,
                                        const TensorMap* value, uint32_t query_full, uint32_t full, uint32_t empty,
                                        int num_tiles, Bug bug) {
  ptx::mbarrier_arrive_expect_tx(query_full, kQueryBytes);
  for (int i = 0; i < 2; ++i) {
    ptx::tma_load(smem + i * 64 * kDim * 2, query, query_full, 0, blockIdx.x * kBlockM + i * 64, blockIdx.y);
  }
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages;
    const uint32_t parity = tile / kStages % 2;
    ptx::mbarrier_wait(empty + 8 * stage, parity ^ 1);
    const uint32_t bytes = bug == Bug::kTooManyBytes  ? 2 * kTileBytes + 16
                           : bug == Bug::kTooFewBytes ? kTileBytes
                                                      : 2 * kTileBytes;
    ptx::mbarrier_arrive_expect_tx(full + 8 * stage, bytes);
    ptx::tma_load(smem + kKeyOffset + stage * kTileBytes, key, full + 8 * stage, 0, tile * kBlockN, blockIdx.y);
    ptx::tma_load(smem + kValueOffset + stage * kTileBytes, value, full + 8 * stage, 0, tile * kBlockN, blockIdx.y);
  }
}

template <int kConsumer>
__device__ __forceinline__ void consume(uint8_t* smem_pointer, uint32_t smem, const TensorMap* out, float* score,
                                        uint32_t query_full, uint32_t full, uint32_t empty, int num_tiles, int num_rows,
                                        float scale, Bug bug) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int tile_row = warp * 16 + lane / 4;
  const int row0 = blockIdx.x * kBlockM + kConsumer * 64;
  const uint32_t s_query = smem + kConsumer * 64 * kDim * 2;
  float acc_out[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) acc_out[i] = 0.0f;

  ptx::mbarrier_wait(query_full, 0);
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages;
    if (bug != Bug::kNoFullWait) ptx::mbarrier_wait(full + 8 * stage, tile / kStages % 2);

    // score tile
    const uint32_t s_key = smem + kKeyOffset + stage * kTileBytes;
    float acc_score[kBlockN / 2];
    if (bug != Bug::kNoWgmmaFence) ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      ptx::wgmma_ss<__nv_bfloat16, ptx::Major::kK, ptx::Major::kK>(
          acc_score, tile_descriptor(s_query + k * 32),
          tile_descriptor(s_key + k * 32, bug == Bug::kWrongDescriptor ? 512 : 1024), k != 0);
    }
    ptx::wgmma_commit();
    if (bug != Bug::kNoWgmmaWait) ptx::wgmma_wait<0>();

    uint32_t a[kBlockN / 16][4];
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc_score[j * 4 + i] *= scale;
        const int row = row0 + tile_row + i / 2 * 8, col = tile * kBlockN + j * 8 + lane % 4 * 2 + i % 2;
        if (row < num_rows && col < num_rows) {
          score[(int64_t{blockIdx.y} * num_rows + row) * num_rows + col] = acc_score[j * 4 + i];
        }
      }
      a[j / 2][j % 2 * 2] = ptx::pack_bf16(acc_score[j * 4], acc_score[j * 4 + 1]);
      a[j / 2][j % 2 * 2 + 1] = ptx::pack_bf16(acc_score[j * 4 + 2], acc_score[j * 4 + 3]);
    }

    // out += score value
    const uint32_t s_value = smem + kValueOffset + stage * kTileBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) {
      ptx::wgmma_rs<__nv_bfloat16, ptx::Major::kMn>(acc_out, a[k], tile_descriptor(s_value + k * 16 * 128), true);
    }
    ptx::wgmma_commit();
    if (bug != Bug::kEarlyRelease) ptx::wgmma_wait<0>();
    const bool releases = (bug == Bug::kOneReleasePerGroup ? thread : lane) == 0;
    if (releases && !(bug == Bug::kMissingRelease && tile == 1 && warp == 2)) ptx::mbarrier_arrive(empty + 8 * stage);
    if (bug == Bug::kEarlyRelease) ptx::wgmma_wait<0>();
  }

  // out tile over this warpgroup's query tile, and from there by one TMA store
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile_row + i * 8;
      *reinterpret_cast<uint32_t*>(smem_pointer + kConsumer * 64 * kDim * 2 + row * 128 + ((j ^ (row % 8)) << 4) +
                                   lane % 4 * 4) = ptx::pack_bf16(acc_out[j * 4 + i * 2], acc_out[j * 4 + i * 2 + 1]);
    }
  }
  if (bug != Bug::kNoProxyFence) ptx::fence_proxy_async();
  if (bug == Bug::kWrongBarrierCount) {
    ptx::barrier_sync<1 + kConsumer, 256>();
  } else if (bug != Bug::kNoBarrierBeforeStore) {
    ptx::barrier_sync<1 + kConsumer, 128>();
  }
  if (thread == 0) {
    ptx::tma_store(out, s_query, 0, row0, blockIdx.y);
    ptx::tma_store_commit();
    if (bug != Bug::kNoStoreWait) ptx::tma_store_wait_read<0>();
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                     const __grid_constant__ TensorMap value, const __grid_constant__ TensorMap out,
                     float* __restrict__ score, int num_rows, float scale, Bug bug) {
  uint8_t* smem_pointer = dynamic_smem();
  const uint32_t smem = ptx::shared_address(smem_pointer);
  const uint32_t query_full = smem + kBarrierOffset, full = query_full + 8, empty = full + 8 * kStages;
  const int num_tiles = (num_rows + kBlockN - 1) / kBlockN;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(query_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full + 8 * stage, 1);
      ptx::mbarrier_init(empty + 8 * stage, bug == Bug::kOneReleasePerGroup ? 2 : 8);
    }
    if (bug != Bug::kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (bug != Bug::kNoBarrierAfterInit) __syncthreads();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::setmaxnreg_decrease<40>();
    if (threadIdx.x == 0) produce(smem, &query, &key, &value, query_full, full, empty, num_tiles, bug);
  } else {
    ptx::setmaxnreg_increase<232>();
    if (warpgroup == 1) {
      consume<0>(smem_pointer, smem, &out, score, query_full, full, empty, num_tiles, num_rows, scale, bug);
    } else {
      consume<1>(smem_pointer, smem, &out, score, query_full, full, empty, num_tiles, num_rows, scale, bug);
    }
  }
}

}  // namespace attention
