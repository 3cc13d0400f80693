// block_mask.h: sizes at the edges and one bit for every tile.
#include <set>
#include <utility>

#include "check.h"
#include "math/block_mask.h"

namespace adasplash2::test {
namespace {

void sizes() {
  for (const int num_queries : {1, 16, 17, 512, 513}) {
    for (const int num_keys : {1, 64, 65, 2048, 2049}) {
      const BlockMaskShape shape(num_queries, num_keys);
      check(shape.num_row_groups * kMaskRows >= num_queries && (shape.num_row_groups - 1) * kMaskRows < num_queries,
            num_queries, " rows in ", shape.num_row_groups, " groups");
      check(shape.num_key_tiles * kMaskKeys >= num_keys && (shape.num_key_tiles - 1) * kMaskKeys < num_keys, num_keys,
            " keys in ", shape.num_key_tiles, " tiles");
      check(shape.key_words() * 32 >= shape.num_key_tiles, "key words");
      check(shape.group_words() * 32 >= shape.num_row_groups, "group words");
      check(shape.row_words() == int64_t(shape.num_row_groups) * shape.key_words(), "row words");
      check(shape.column_words() == int64_t(shape.num_key_tiles) * shape.group_words(), "column words");
    }
  }
}

void bits_are_distinct() {
  std::set<std::pair<int, uint32_t>> seen;
  for (int tile = 0; tile < 100; ++tile) seen.emplace(mask_word(tile), mask_bit(tile));
  check(seen.size() == 100, "only ", seen.size(), " distinct bits for 100 tiles");
}

}  // namespace
}  // namespace adasplash2::test

int main() {
  using namespace adasplash2::test;
  sizes();
  bits_are_distinct();
  return result();
}
