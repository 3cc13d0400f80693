// Which keys a query row may see and which rows see a key: causal order, lengths, query head -> kv head.
#pragma once

#include <cstdint>

#include "math/host_device.h"

namespace adasplash2 {

template <typename Int>
ADASPLASH2_HOST_DEVICE constexpr Int ceil_div(Int value, Int divisor) {
  return (value + divisor - 1) / divisor;
}

ADASPLASH2_HOST_DEVICE constexpr int kv_head_of(int head, int num_heads, int num_kv_heads) {
  return head / (num_heads / num_kv_heads);
}

// One sequence. Query i sees exactly the keys [0, num_visible_keys(i)), so a row's work is a prefix of the keys
// and a key's work is a suffix of the rows.
struct WorkRange {
  int num_queries;  // Nq
  int num_keys;     // Nk
  int length;       // keys at and past it take no part; with Nq == Nk so do query rows
  bool is_causal;

  ADASPLASH2_HOST_DEVICE int num_live_rows() const {
    return num_queries == num_keys && length < num_queries ? length : num_queries;
  }

  ADASPLASH2_HOST_DEVICE int num_visible_keys(int row) const {
    if (row >= num_live_rows()) return 0;
    int visible = length < num_keys ? length : num_keys;
    if (is_causal) {
      const int causal_end = row + num_keys - num_queries + 1;  // bottom right corner: the last row sees every key
      visible = causal_end < visible ? causal_end : visible;
    }
    return visible > 0 ? visible : 0;
  }

  // The largest and the smallest number of visible keys among the rows [row_begin, row_end) that are not padding;
  // the count never falls from one row to the next until the padding begins.
  ADASPLASH2_HOST_DEVICE int max_visible_keys(int row_begin, int row_end) const {
    const int end = row_end < num_live_rows() ? row_end : num_live_rows();
    return end > row_begin ? num_visible_keys(end - 1) : 0;
  }
  ADASPLASH2_HOST_DEVICE int min_visible_keys(int row_begin) const { return num_visible_keys(row_begin); }

  // Rows [first_row_of(key), num_live_rows()) see the key; empty where the key is masked for all.
  ADASPLASH2_HOST_DEVICE int first_row_of(int key) const {
    if (key >= length || key >= num_keys) return num_live_rows();
    const int first = is_causal ? key - (num_keys - num_queries) : 0;
    return first > 0 ? first : 0;
  }
};

}  // namespace adasplash2
