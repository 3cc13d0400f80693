// Tile sizes, warps and stages of the sm80 kernels: read by host and device, so that a launch cannot disagree with its
// kernel. Registers, shared memory and occupancy of every instance are tabulated in docs/kernels.md.
#pragma once

#include <type_traits>

#include "math/block_mask.h"
#include "math/entmax.h"
#include "math/histogram.h"
#include "params.h"

namespace adasplash2::cuda {

constexpr int kWarpSize = 32;

// NOTE: eight warps leave 255 registers a thread and give each scheduler a second warp to run during the first one's
// waits. Without it ptxas aims for more at head dim 64 and spills.
constexpr int kWarpsPerSm = 8;
constexpr int kMinBlocksPerSm = 2;  // of 4 warps

// A block's on GPUs of compute capability 8.6, 8.9 and 12.x, the least that there is from Ampere on.
constexpr int kMostSmemBytes = 99 * 1024;

constexpr int kLargestHeadDim = 256;

// Head dims that are built; any multiple of 8 is padded with zeros, on the fly, to the next of them. The sizes below
// go by the columns of a tile (tile/smem_layout.cuh): a float takes three, so float32 has kCols = 384 at head dim 128
// and 768 at 256.
constexpr int instance_head_dim(const AttentionProblem& problem) {
  const int64_t head_dim = problem.head_dim > problem.value_head_dim ? problem.head_dim : problem.value_head_dim;
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}
constexpr int kFloatParts = 3;
constexpr int instance_cols(const AttentionProblem& problem) {
  return instance_head_dim(problem) * (problem.dtype == DataType::kFloat32 ? kFloatParts : 1);
}

// NOTE: everything of the scan is sized for three blocks an SM, 12 warps: with 8 a warp was ready in 21% of the cycles
// (H200, 2026-11-23). That leaves 168 registers a thread and 75 KB a block (two blocks of 81 KB on an A100). Masks and
// the parts of floats take more registers.
constexpr int kMostScanBlocks = 3;
template <typename Element, bool kHasMask>
constexpr int kMinScanBlocks = kHasMask || std::is_same_v<Element, float> ? kMinBlocksPerSm : kMostScanBlocks;

// Pass A. A warp owns its rows alone: their histogram needs no other warp.
template <int kCols>
struct ScanConfig {
  // The queries stay in registers. Of the widest rows 16 do not fit, so all queries of the block stay in shared memory.
  static constexpr bool kQueryInRegisters = kCols <= 384;
  static constexpr int kWarps = kQueryInRegisters ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarpSize;
  // NOTE: 32 rows a warp halve the shared-memory reads of K per mma (one ldmatrix feeds four), which would otherwise
  // take as long as the mma themselves. From 256 columns on the query fragments leave registers for 16 only.
  static constexpr int kRowsPerWarp = kCols <= 128 ? 32 : 16;
  static constexpr int kBlockM = kWarps * kRowsPerWarp;
  static constexpr int kBlockN = kCols <= 64    ? kMaskKeys  // a stage of the key ring
                                 : kCols <= 384 ? kMaskKeys / 2
                                                : kMaskKeys / 4;
  static constexpr int kStages = kCols <= 256 ? 3 : kCols <= 384 ? 2 : 1;
  static constexpr int kKeysPerStep = kCols == 128 || kCols > 256 ? 16 : 32;  // scores in registers at a time
  static_assert(kMaskKeys % kBlockN == 0 && kBlockN % kKeysPerStep == 0, "a mask tile is some stages of some steps");

  // Hits wait in lists of this many per lane and row; a list is flushed when those of the next step may not fit.
  static constexpr int kHitsPerList = 14;
  static constexpr int kMostHitsPerStep = kKeysPerStep / 4;  // the four lanes of a quad share a row
  static_assert(kHitsPerList >= kMostHitsPerStep, "an empty list must take one step");

  static constexpr int kRowsPerLane = kRowsPerWarp / 8;
  // Odd, so that lanes that solve neighbouring rows start in different banks.
  static constexpr int kRowWords = kNumSlots * kPackedBinWords + 1;

  // Thresholds are remembered before the first tile and after tiles 1, 2, 4, 8, ...: 2^20 keys are 2^14 tiles.
  static constexpr int kSnapshots = 15;
  static_assert(kMaxKeys / kMaskKeys <= int64_t(1) << (kSnapshots - 1), "the last tile needs a snapshot before it");

  static constexpr int kQueryBytes = kQueryInRegisters ? 0 : kBlockM * kCols * 2;
  static constexpr int kKeyBytes = kStages * kBlockN * kCols * 2;
  static constexpr int kHistogramBytes = kBlockM * kRowWords * 4;
  static constexpr int kHitBytes = kThreads * kRowsPerLane * kHitsPerList * 2;
  static constexpr int kSnapshotBytes = kSnapshots * kBlockM * 2;
  static constexpr int kVisibleBytes = kBlockM * 4;
  static constexpr int kSmemBytes =
      kQueryBytes + kKeyBytes + kHistogramBytes + kHitBytes + kSnapshotBytes + kVisibleBytes;
  static_assert((kQueryInRegisters ? kMostScanBlocks : kMinBlocksPerSm) * (kSmemBytes + 1024) <= 228 * 1024,
                "an SM of sm_90 has 228 KB, 1 KB of each block its own");
  static_assert(kBlockM * kCols * 2 <= kSmemBytes, "the queries pass through shared memory on their way to registers");
};

// Columns of a tile that a block accumulates a product for, twice: two such accumulators of 16 rows fill the registers
// at 128 numbers a row.
template <int kCols>
constexpr int kMostAccumulatedCols = kCols <= 128       ? kCols
                                     : kCols % 192 == 0 ? 192
                                                        : 128;

// Keys in shared memory at a time: a mask tile, or a part of one where tiles are wide.
template <int kCols>
constexpr int kKeysPerPart = kCols <= 128   ? kMaskKeys
                             : kCols <= 256 ? kMaskKeys / 2
                                            : kMaskKeys / 4;

// Rows (keys) of a block of the gradients: those of two tensors, and the keys (queries) on their way past them, must
// fit shared memory.
constexpr int grad_block_rows(int cols) { return cols <= 256 ? 64 : cols <= 384 ? 32 : 16; }

// Pass B.
template <int kCols>
struct OutputConfig {
  static constexpr int kRowWarps = kCols <= 384 ? 4 : 1;
  static constexpr int kChunkWarps = 4 / kRowWarps;  // with the same rows, each has columns of the values
  static constexpr int kWarps = kRowWarps * kChunkWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = kRowWarps * kMaskRows;
  static constexpr int kBlockN = kCols % 192 == 0 ? kMaskKeys / 4 : kKeysPerPart<kCols>;
  // Scores in registers at a time. At head dim 128 they and two accumulators leave no room for the queries.
  template <AlphaKind kKind, bool kHasMask>
  static constexpr int kKeysPerStep =
      kCols <= 64 || (kCols <= 128 && kKind != AlphaKind::kGeneral && !kHasMask) ? 64 : 16;
  static constexpr int kStages = kCols <= 384 ? 2 : 1;
  // Of A_p and A_w, a warp's and a block's; wider values take more blocks.
  static constexpr int kWarpChunk = kMostAccumulatedCols<kCols>;
  static constexpr int kValueChunk = kChunkWarps * kWarpChunk;
  template <AlphaKind kKind>  // the power function needs registers too
  static constexpr bool kQueryInRegisters = kCols <= 64 && kKind != AlphaKind::kGeneral;

  static constexpr int kQueryBytes = kBlockM * kCols * 2;
  static constexpr int kKeyBytes = kStages * kBlockN * kCols * 2;
  static constexpr int kValueBytes = kStages * kBlockN * kValueChunk * 2;
  static constexpr int kFlagBytes = kWarps * 4;
  static constexpr int kSmemBytes = kQueryBytes + kKeyBytes + kValueBytes + kFlagBytes;
};

// Backward, dq: one block for grad_block_rows() rows, over their live key tiles.
template <int kCols, bool kHasMask>
struct GradQueryConfig {
  // NOTE: 32 rows a warp where registers allow: each fragment of K and V read from shared memory then feeds four mma,
  // not two, and the reads take less time than the mma. Two such warps make a block, four blocks an SM.
  static constexpr int kRowsPerWarp = kCols <= 64 && !kHasMask ? 32 : 16;
  static constexpr int kBlockM = grad_block_rows(kCols);
  static constexpr int kRowWarps = kBlockM / kRowsPerWarp;
  static constexpr int kChunkWarps = kCols <= 384 ? 1 : 4;  // with the same rows, each has columns of dq
  static constexpr int kWarps = kRowWarps * kChunkWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = kWarpsPerSm / kWarps;
  static constexpr int kBlockN = kCols == 256 ? 16 : kKeysPerPart<kCols>;
  // Scores in registers at a time; of float32 their masks too.
  static constexpr int kKeysPerStep = kBlockN < 32 || (kCols == 192 && kHasMask) ? 16 : 32;
  static constexpr int kStages = kCols <= 256 ? 2 : 1;
  static constexpr bool kQueryInRegisters = kCols <= 128;
  static constexpr bool kGradOutInRegisters = kCols == 128;

  static constexpr int kQueryBytes = kBlockM * kCols * 2;
  static constexpr int kKeyBytes = kStages * kBlockN * kCols * 2;
  static constexpr int kSmemBytes = 2 * kQueryBytes + 2 * kKeyBytes;
};

// Backward, the gradients of alpha and of the mask: two products a tile, no prefetch.
template <int kCols>
struct GradSumsConfig {
  static constexpr int kBlockM = grad_block_rows(kCols);
  static constexpr int kWarps = kBlockM / kMaskRows;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = kWarpsPerSm / kWarps;
  static constexpr int kBlockN = kKeysPerPart<kCols>;

  static constexpr int kQueryBytes = kBlockM * kCols * 2;
  static constexpr int kKeyBytes = kBlockN * kCols * 2;
  static constexpr int kSmemBytes = 2 * kQueryBytes + 2 * kKeyBytes;
};

// Backward, dk and dv: one block for up to 64 keys, over their live query blocks, in all heads of the group.
template <int kCols, bool kHasMask>
struct GradKeyValueConfig {
  static constexpr int kKeysPerWarp = kCols <= 64 && !kHasMask ? 32 : 16;  // as kRowsPerWarp of GradQueryConfig
  static constexpr int kUnroll = kKeysPerWarp == 32 ? 2 : 4;  // of the products' steps; 32 keys leave few registers
  static constexpr int kBlockN = grad_block_rows(kCols);
  static_assert(kMaskKeys % kBlockN == 0, "a block's keys lie in one column of the mask");
  static constexpr int kKeyWarps = kBlockN / kKeysPerWarp;
  static constexpr int kChunkWarps = kCols <= 256 ? 1 : kCols <= 384 ? 2 : 4;  // same keys, columns of dk and dv each
  static constexpr int kWarps = kKeyWarps * kChunkWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = kWarpsPerSm / kWarps;
  // Of floats 16: scores and three parts of each operand in registers at a time.
  static constexpr int kBlockM = kCols <= 64 ? 64 : kCols <= 128 ? 32 : 16;
  static constexpr int kQueriesPerStep = kBlockM < 32 ? kBlockM : 32;
  static constexpr int kStages = kCols <= 256 ? 2 : 1;
  static constexpr int kWarpChunk = kMostAccumulatedCols<kCols>;  // of dk and dv a warp accumulates
  static constexpr int kGradChunk = kChunkWarps * kWarpChunk;     // and a block

  static constexpr int kKeyBytes = kBlockN * kCols * 2;
  static constexpr int kQueryBytes = kStages * kBlockM * kCols * 2;
  static constexpr int kStatBytes = kStages * kBlockM * 4;
  static constexpr int kFirstRowBytes = kBlockN * 4;
  static constexpr int kSmemBytes = 2 * kKeyBytes + 2 * kQueryBytes + 2 * kStatBytes + kFirstRowBytes;
};

}  // namespace adasplash2::cuda
