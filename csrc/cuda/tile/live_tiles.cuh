// Walks the set bits of a few neighbouring rows of a bit mask: the one way in which kernels visit tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "math/block_mask.h"

namespace adasplash2::cuda {

// Indices i < num_bits, ascending, whose bit is set in any of num_rows rows of `words_per_row` words. Every thread of a
// block sees the same sequence.
class LiveTiles {
 public:
  __device__ __forceinline__ LiveTiles(const uint32_t* g_rows, int num_rows, int words_per_row, int num_bits)
      : g_rows_(g_rows), num_rows_(num_rows), words_per_row_(words_per_row), num_words_((num_bits + 31) / 32) {}

  // The next index, or -1 when there is none.
  __device__ __forceinline__ int next() {
    while (bits_ == 0) {
      if (++word_ >= num_words_) return -1;
      for (int row = 0; row < num_rows_; ++row) bits_ |= g_rows_[int64_t(row) * words_per_row_ + word_];
    }
    const int bit = __ffs(static_cast<int>(bits_)) - 1;
    bits_ &= bits_ - 1;
    return word_ * 32 + bit;
  }

 private:
  const uint32_t* g_rows_;
  int num_rows_, words_per_row_, num_words_;
  int word_ = -1;
  uint32_t bits_ = 0;
};

// The same in parts of kBlockN keys, of which a tile has one or more: where they begin.
template <int kBlockN>
class LiveParts {
 public:
  __device__ __forceinline__ explicit LiveParts(const LiveTiles& tiles) : tiles_(tiles) {}

  // The first key of the next part, or -1 when there is none.
  __device__ __forceinline__ int next() {
    static_assert(kMaskKeys % kBlockN == 0, "a tile is whole parts");
    if (++part_ == kMaskKeys / kBlockN) {
      part_ = 0;
      tile_ = tiles_.next();
    }
    return tile_ < 0 ? -1 : tile_ * kMaskKeys + part_ * kBlockN;
  }

 private:
  LiveTiles tiles_;
  int tile_ = -1, part_ = kMaskKeys / kBlockN - 1;
};

// body(first key, stage) for all parts, when copy(first key, stage), by all threads of the block, has brought the part
// to shared memory: with two stages while the part before is worked on, with one when all warps are done with that.
template <int kStages, int kBlockN, typename Copy, typename Body>
__device__ __forceinline__ void for_each_part(LiveParts<kBlockN> parts, const Copy& copy, const Body& body) {
  static_assert(kStages == 1 || kStages == 2, "one part is worked on, at most one is on its way");
  int key_begin = parts.next();
  if (kStages == 2 && key_begin >= 0) copy(key_begin, 0);
  ptx::cp_async_commit();
  for (int stage = 0; key_begin >= 0; stage ^= kStages - 1) {
    const int next_key_begin = parts.next();
    if constexpr (kStages == 1) {
      __syncthreads();
      copy(key_begin, 0);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kStages == 2 && next_key_begin >= 0) copy(next_key_begin, stage ^ 1);
    ptx::cp_async_commit();
    body(key_begin, stage);
    key_begin = next_key_begin;
  }
}

}  // namespace adasplash2::cuda
