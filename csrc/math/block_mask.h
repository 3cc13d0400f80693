// The one definition of the block mask: one bit for kMaskRows query rows x kMaskKeys keys.
//
//   rows:    uint32 [batch, head, row_group, key_word]    bit n % 32 of word n / 32 is key tile n
//   columns: uint32 [batch, head, key_tile, group_word]   the transpose: bit g % 32 of word g / 32 is row group g
//
// A bit is 1 where some (row, key) of its tile may have gap > 0; where it is 0 nothing of the tile is in any support.
#pragma once

#include <cstdint>

#include "math/host_device.h"
#include "math/work_range.h"

namespace adasplash2 {

constexpr int kMaskRows = 16;  // rows of one mma fragment: the finest granularity that costs the scan nothing
constexpr int kMaskKeys = 64;

struct BlockMaskShape {
  int num_row_groups;
  int num_key_tiles;

  ADASPLASH2_HOST_DEVICE BlockMaskShape(int num_queries, int num_keys)
      : num_row_groups(ceil_div(num_queries, kMaskRows)), num_key_tiles(ceil_div(num_keys, kMaskKeys)) {}

  ADASPLASH2_HOST_DEVICE int key_words() const { return ceil_div(num_key_tiles, 32); }
  ADASPLASH2_HOST_DEVICE int group_words() const { return ceil_div(num_row_groups, 32); }

  // Words of one (batch, head) in either orientation.
  ADASPLASH2_HOST_DEVICE int64_t row_words() const { return int64_t(num_row_groups) * key_words(); }
  ADASPLASH2_HOST_DEVICE int64_t column_words() const { return int64_t(num_key_tiles) * group_words(); }
};

ADASPLASH2_HOST_DEVICE constexpr uint32_t mask_bit(int index) { return 1u << (index & 31); }
ADASPLASH2_HOST_DEVICE constexpr int mask_word(int index) { return index >> 5; }

}  // namespace adasplash2
