// Where the forward pass leaves the support for the backward pass, in one buffer whose size depends on shapes alone.
//
//   [used]         int64: bytes of [entries] that are taken
//   [row origins]  (B, H, Nq) of (score_max, tau_shifted), both of the accumulation type, in the scan's own units
//                  (head_view.h): gap = unit * ((u - score_max) - tau_shifted) without cancellation, however large u is
//   [row blocks]   (B, H, ceil(Nq / kRowBlock)) of int64: 1 + where the block's entries begin, or 0: not saved
//   [entries]      of a block, its rows one after the other: gap[n] (accumulation type) and column[n] (int32), n = the
//                  row's support size
//
// A block takes its place when its size is known, so entries fill the buffer from the front, whatever the order in
// which blocks are done; of the pages behind them nothing is ever touched. A block whose rows keep more than
// block_capacity entries is not saved; the backward pass then recomputes its scores and takes the gaps from the row
// origins. What is in front of the entries must be zero on entry.
#pragma once

#include <algorithm>

#include "params.h"

namespace adasplash2::cpu {

constexpr int64_t kRowBlock = 96;      // queries that are scanned together: a multiple of the micro-kernel's 6 rows
constexpr int64_t kStripKeys = 256;    // problems of so few keys are always done in strips, and nothing is saved
constexpr int64_t kSavedPerRow = 512;  // mean support up to which a row block is saved: 4 KB a row in float32

// Row blocks that gather together, which is one task: the more, the fewer times they fetch K and V from beyond the L2
// cache. Fewer where there would be too few tasks for many threads.
constexpr int64_t kMostGatherBlocks = 4, kGatherRows = kMostGatherBlocks * kRowBlock;
constexpr int64_t kLeastGatherTasks = 64;

struct SupportLayout {
  static constexpr int64_t kAlignment = 64;  // of the three parts behind `used`
  int64_t real_bytes;                        // of the accumulation type
  int64_t num_rows;                          // B * H * Nq
  int64_t blocks_per_head;
  int64_t num_blocks;
  int64_t block_capacity;  // entries
  int64_t gather_blocks;

  explicit SupportLayout(const AttentionProblem& problem)
      : real_bytes(problem.dtype == DataType::kFloat64 ? 8 : 4),
        num_rows(problem.batch * problem.num_heads * problem.num_queries),
        blocks_per_head((problem.num_queries + kRowBlock - 1) / kRowBlock),
        num_blocks(problem.batch * problem.num_heads * blocks_per_head),
        block_capacity(problem.num_keys <= kStripKeys ? 0 : kRowBlock * std::min(problem.num_keys, kSavedPerRow)),
        gather_blocks(std::clamp<int64_t>(num_blocks / kLeastGatherTasks, 1, kMostGatherBlocks)) {}

  int64_t entry_bytes() const { return real_bytes + static_cast<int64_t>(sizeof(int32_t)); }
  int64_t origin_offset(int64_t row) const { return kAlignment + row * 2 * real_bytes; }
  int64_t block_offset(int64_t block) const {
    return aligned(origin_offset(num_rows)) + block * static_cast<int64_t>(sizeof(int64_t));
  }
  int64_t entries_offset() const { return aligned(block_offset(num_blocks)); }
  int64_t bytes() const { return entries_offset() + num_blocks * block_capacity * entry_bytes(); }

  int64_t used_bytes(const void* support) const { return entries_offset() + *static_cast<const int64_t*>(support); }

  // The entries of a block that was saved, or null.
  const char* saved_block(const void* support, int64_t block) const {
    const char* base = static_cast<const char*>(support);
    const int64_t place = *reinterpret_cast<const int64_t*>(base + block_offset(block));
    return place == 0 ? nullptr : base + entries_offset() + place - 1;
  }

  // Room for a block's entries; null if they are too many.
  char* take_block(void* support, int64_t block, int64_t num_entries) const {
    if (num_entries > block_capacity) return nullptr;
    char* base = static_cast<char*>(support);
    const int64_t place =
        __atomic_fetch_add(reinterpret_cast<int64_t*>(base), num_entries * entry_bytes(), __ATOMIC_RELAXED);
    *reinterpret_cast<int64_t*>(base + block_offset(block)) = place + 1;
    return base + entries_offset() + place;
  }

 private:
  static int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
};

}  // namespace adasplash2::cpu
