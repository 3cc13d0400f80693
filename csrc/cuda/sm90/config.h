// Tile sizes, warpgroups and stages of the sm90 kernels: read by host and device.
#pragma once

#include "cuda/config.h"

namespace adasplash2::cuda::sm90 {

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupWarps = 4;
constexpr int kRowsPerConsumer = 64;  // the M of wgmma

// Blocks that may have so many keys (or queries) are put in order of their live tiles: the longest then takes several
// times as long as the sort. Tests of short problems set it lower.
#ifndef ADASPLASH2_ORDERED_LENGTH
#define ADASPLASH2_ORDERED_LENGTH 8192
#endif
constexpr int64_t kOrderedLength = ADASPLASH2_ORDERED_LENGTH;

constexpr int kSmemPerBlock = 232448;  // 227 KB, the most that a block of an H100 can have
constexpr int kSmemPerSm = 233472;     // 1 KB of it goes with each block

// A producer warpgroup and two consumers: 56 * 128 + 224 * 256 registers are the 168 * 384 that the block starts with.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;

// Stages of a ring of key and value tiles: as many as shared memory holds beside the rows of a block.
template <int kHeadDim>
constexpr int kKeyStages = kHeadDim <= 64 ? 8 : 4;

// Between passes A and B, where rows are coarse: two blocks an SM, as each consumer waits for its product.
template <int kHeadDim>
struct RefineConfig {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kBlockM = kConsumers * kRowsPerConsumer;
  static constexpr int kBlockN = kMaskKeys;
  static constexpr int kStages = kKeyStages<kHeadDim>;
  // 24 * 128 + 104 * 256 of the 80 * 384 that the block starts with
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 104;
};

// Pass B.
template <int kHeadDim>
struct OutputConfig {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
  static constexpr int kBlockM = kConsumers * kRowsPerConsumer;
  static constexpr int kBlockN = kMaskKeys;
  static constexpr int kStages = kKeyStages<kHeadDim>;
  // NOTE: with two accumulators of 128 columns the queries do not fit beside them; wgmma then reads them from shared
  // memory.
  static constexpr bool kQueryInRegisters = kHeadDim <= 64;
};

// Backward, dq.
template <int kHeadDim>
struct GradQueryConfig {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
  static constexpr int kBlockM = kConsumers * kRowsPerConsumer;
  static constexpr int kBlockN = kMaskKeys;
  static constexpr int kStages = kKeyStages<kHeadDim>;
  // NOTE: at 128 columns both do not fit beside the accumulators.
  static constexpr bool kQueryInRegisters = true, kGradOutInRegisters = kHeadDim <= 64;
};

// Backward, dk and dv: a producer warpgroup and two consumers of 64 keys each, which share the queries that pass by.
template <int kHeadDim>
struct GradKeyValueConfig {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
  static constexpr int kBlockM = 64;  // queries of a stage
  static constexpr int kBlockN = kConsumers * kMaskKeys;
  static_assert(kMaskKeys == kRowsPerConsumer, "a consumer owns one column of the mask");
  static constexpr int kStages = 4;
  // NOTE: at 128 columns a producer that takes items does not fit into the 24 registers that the consumers leave it;
  // with 3 of them spilled, blocks that stay won 2 to 6% (H200, N = 4096 and 16384).
  static constexpr bool kStays = kHeadDim <= 64;
  static constexpr int kSlots = kStays ? 2 : 1;  // for keys and values: those of the next item, too
  // 240 * 256 + 24 * 128 = 232 * 256 + 40 * 128 = 168 * 384, what the block has at its launch
  static constexpr int kProducerRegisters = kHeadDim <= 64 ? 40 : 24;
  static constexpr int kConsumerRegisters = kHeadDim <= 64 ? 232 : 240;
};

}  // namespace adasplash2::cuda::sm90
