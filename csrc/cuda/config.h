// Tile sizes, warps and stages of the sm80 kernels: read by host and device, so that a launch cannot disagree with its
// kernel. Registers, shared memory and occupancy of every instance are tabulated in docs/kernels.md.
#pragma once

#include "math/block_mask.h"
#include "math/entmax.h"
#include "math/histogram.h"
#include "params.h"

namespace adasplash2::cuda {

constexpr int kWarpSize = 32;

// NOTE: two blocks of 4 warps leave 255 registers a thread and give each scheduler a second warp to run during the
// first one's waits. Without it ptxas aims for three blocks at head dim 64 and spills.
constexpr int kMinBlocksPerSm = 2;

constexpr int kLargestHeadDim = 256;
constexpr int kLargestFloatHeadDim = 128;

// Head dims that are built; any multiple of 8 is padded with zeros, on the fly, to the next of them. The sizes below
// are those of 16-bit elements: a float takes the room of two, so float32 at 128 is laid out as 256.
// NOTE: float32 has one instance. With 32 rows a warp, as at 128, its scores and three parts of each operand spill.
constexpr int instance_head_dim(int64_t head_dim, DataType dtype) {
  return head_dim <= 64 && dtype != DataType::kFloat32 ? 64 : head_dim <= 128 ? 128 : 256;
}

// Pass A. A warp owns its rows alone: their histogram needs no other warp.
template <int kHeadDim>
struct ScanConfig {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  // NOTE: 32 rows a warp halve the shared-memory reads of K per mma (one ldmatrix feeds four), which would otherwise
  // take as long as the mma themselves. At head dim 256 the query fragments leave registers for 16 only.
  static constexpr int kRowsPerWarp = kHeadDim <= 128 ? 32 : 16;
  static constexpr int kBlockM = kWarps * kRowsPerWarp;
  static constexpr int kBlockN = kMaskKeys;
  // NOTE: as many stages as leave room for two blocks in the 227 KB of an H100: with one, nothing runs while its warps
  // flush and solve.
  static constexpr int kStages = kHeadDim <= 64 ? 3 : 2;

  // Hits wait in lists of this many per lane and row; a list is flushed when the next kScoresPerGroup may not fit.
  static constexpr int kHitsPerList = 12;
  static constexpr int kScoresPerGroup = 4;  // of one row, held by one lane, in 16 columns
  static_assert(kHitsPerList >= kScoresPerGroup, "an empty list must take one group");

  static constexpr int kRowsPerLane = kRowsPerWarp / 8;
  // Odd, so that lanes that solve neighbouring rows start in different banks.
  static constexpr int kRowWords = kNumSlots * kBinWords + 1;

  // Thresholds are remembered before the first tile and after tiles 1, 2, 4, 8, ...: 2^20 keys are 2^14 tiles.
  static constexpr int kSnapshots = 15;
  static_assert(kMaxKeys / kBlockN <= int64_t(1) << (kSnapshots - 1), "the last tile needs a snapshot before it");

  static constexpr int kKeyBytes = kStages * kBlockN * kHeadDim * 2;
  static constexpr int kHistogramBytes = kBlockM * kRowWords * 4;
  static constexpr int kHitBytes = kThreads * kRowsPerLane * kHitsPerList * 4;
  static constexpr int kSnapshotBytes = kSnapshots * kBlockM * 4;
  static constexpr int kSmemBytes = kKeyBytes + kHistogramBytes + kHitBytes + kSnapshotBytes;
  static_assert(kBlockM <= kStages * kBlockN, "the queries pass through the key ring on their way to registers");
};

// Pass B.
template <int kHeadDim>
struct OutputConfig {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = kWarps * kMaskRows;
  static constexpr int kBlockN = kMaskKeys;
  static constexpr int kKeysPerStep = kHeadDim <= 64 ? 64 : 16;  // scores in registers at a time
  static constexpr int kStages = 2;
  // Two accumulators (A_p and A_w) of 16 rows a warp fill the registers at 128 columns; wider values take more blocks.
  static constexpr int kValueChunk = kHeadDim <= 128 ? kHeadDim : 128;
  template <AlphaKind kKind>  // the power function needs registers too
  static constexpr bool kQueryInRegisters = kHeadDim <= 128 && kKind != AlphaKind::kGeneral;

  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kKeyBytes = kStages * kBlockN * kHeadDim * 2;
  static constexpr int kValueBytes = kStages * kBlockN * kValueChunk * 2;
  static constexpr int kFlagBytes = kWarps * 4;
  static constexpr int kSmemBytes = kQueryBytes + kKeyBytes + kValueBytes + kFlagBytes;
};

// Backward, dq: one block for 64 rows, over their live key tiles.
template <int kHeadDim>
struct GradQueryConfig {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = kWarps * kMaskRows;
  static constexpr int kBlockN = kHeadDim <= 128 ? kMaskKeys : kMaskKeys / 2;  // half a mask tile: shared memory
  static constexpr int kStages = 2;
  static constexpr bool kQueryInRegisters = kHeadDim <= 64;

  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kKeyBytes = kStages * kBlockN * kHeadDim * 2;
  static constexpr int kSmemBytes = 2 * kQueryBytes + 2 * kKeyBytes;
};

// Backward, dk and dv: one block for 64 keys, over their live query blocks, in all heads of the group.
template <int kHeadDim>
struct GradKeyValueConfig {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockN = kWarps * 16;
  static_assert(kBlockN == kMaskKeys, "a block owns one column of the mask");
  static constexpr int kBlockM = kHeadDim <= 64 ? 64 : 32;
  static constexpr int kStages = 2;
  static constexpr int kGradChunk = kHeadDim <= 128 ? kHeadDim : 128;  // columns of dk and dv a block accumulates

  static constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
  static constexpr int kQueryBytes = kStages * kBlockM * kHeadDim * 2;
  static constexpr int kStatBytes = kStages * kBlockM * 4;
  static constexpr int kSmemBytes = 2 * kKeyBytes + 2 * kQueryBytes + 2 * kStatBytes;
};

}  // namespace adasplash2::cuda
