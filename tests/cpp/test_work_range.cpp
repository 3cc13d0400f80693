// work_range.h against the definition, pair by pair.
#include "check.h"
#include "math/work_range.h"

namespace adasplash2::test {
namespace {

bool sees(int row, int key, int num_queries, int num_keys, int length, bool is_causal) {
  if (key >= length) return false;
  if (num_queries == num_keys && row >= length) return false;
  return !is_causal || key <= row + num_keys - num_queries;
}

void every_pair() {
  for (const bool is_causal : {false, true}) {
    for (const int num_queries : {1, 4, 9}) {
      for (const int num_keys : {1, 4, 9}) {
        for (int length = 0; length <= num_keys; ++length) {
          const WorkRange range{num_queries, num_keys, length, is_causal};
          int largest = 0;
          for (int row = 0; row < num_queries; ++row) {
            int visible = 0;
            for (int key = 0; key < num_keys; ++key) {
              const bool expected = sees(row, key, num_queries, num_keys, length, is_causal);
              visible += expected;
              check((key < range.num_visible_keys(row)) == expected, "row ", row, " key ", key, " of ", num_queries,
                    " x ", num_keys, ", length ", length, ", causal ", is_causal);
              check((row >= range.first_row_of(key) && row < range.num_live_rows()) == expected, "column view of row ",
                    row, " key ", key, " of ", num_queries, " x ", num_keys, ", length ", length);
            }
            largest = largest > visible ? largest : visible;
            check(range.max_visible_keys(0, row + 1) == largest, "largest of rows 0 to ", row);
          }
        }
      }
    }
  }
}

void heads() {
  for (int head = 0; head < 12; ++head) check(kv_head_of(head, 12, 3) == head / 4, "head ", head);
  check(kv_head_of(5, 6, 6) == 5, "as many kv heads as heads");
}

}  // namespace
}  // namespace adasplash2::test

int main() {
  using namespace adasplash2::test;
  every_pair();
  heads();
  return result();
}
