// Where the forward pass leaves the support for the backward pass, in one buffer whose size depends on shapes alone.
//
//   [row origins]  (B, H, Nq) of (score_max, tau_shifted), both of the accumulation type, in the scan's own units
//                  (head_view.h): gap = unit * ((u - score_max) - tau_shifted) without cancellation, however large u is
//   [row blocks]   (B, H, ceil(Nq / kRowBlock)) regions of a header (int64: 1 = saved) and kRowBlock * kSavedPerRow
//                  entries; the rows of a block follow each other, each as gap[n] (accumulation type) and column[n]
//                  (int32), n = its support size
//
// A block whose rows need more entries than its region holds is not saved; the backward pass then recomputes its scores
// and takes the gaps from the row origins.
#pragma once

#include "params.h"

namespace adasplash2::cpu {

constexpr int64_t kRowBlock = 96;      // queries a task scans together: a multiple of the micro-kernel's 6 rows
constexpr int64_t kSavedPerRow = 512;  // mean support up to which a row block is saved: 4 KB a row in float32

struct SupportLayout {
  static constexpr int64_t kHeaderBytes = sizeof(int64_t);
  int64_t real_bytes;  // of the accumulation type
  int64_t num_rows;    // B * H * Nq
  int64_t blocks_per_head;
  int64_t block_capacity;  // entries

  explicit SupportLayout(const AttentionProblem& problem)
      : real_bytes(problem.dtype == DataType::kFloat64 ? 8 : 4),
        num_rows(problem.batch * problem.num_heads * problem.num_queries),
        blocks_per_head((problem.num_queries + kRowBlock - 1) / kRowBlock),
        block_capacity(kRowBlock * (problem.num_keys < kSavedPerRow ? problem.num_keys : kSavedPerRow)) {}

  int64_t entry_bytes() const { return real_bytes + static_cast<int64_t>(sizeof(int32_t)); }
  int64_t origin_offset(int64_t row) const { return row * 2 * real_bytes; }
  int64_t block_offset(int64_t head, int64_t block) const {
    const int64_t origins = (num_rows * 2 * real_bytes + 63) / 64 * 64;
    return origins + (head * blocks_per_head + block) * (kHeaderBytes + block_capacity * entry_bytes());
  }
  int64_t bytes(int64_t num_heads) const { return block_offset(num_heads, 0); }
};

}  // namespace adasplash2::cpu
