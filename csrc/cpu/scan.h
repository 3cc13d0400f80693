// The scan: one dense pass over the keys of a row block, keeping of each row the scores above a lower bound on tau.
//
// Operands are packed: keys in panels [panel][sub-tile][D][kTileCols], zero-padded, once per kv head; queries in groups
// of kTileRows as [group][D][kTileRows]. A register tile of kTileRows x kTileCols accumulators is multiplied and
// filtered without ever being written: only hits leave it, compressed into the row's list of (score, column). A list
// that has doubled is pruned by a better bound, one Newton step from the tau of what has been seen.
#pragma once

#include "cpu/entmax_math.h"
#include "cpu/head_view.h"
#include "cpu/support_layout.h"
#include "cpu/tasks.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

// 6 x 4 (AVX-512) or 6 x 2 accumulators leave just enough of 32 or 16 registers for the operands.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;
template <class Real>
constexpr int kTileCols = kTileVectors * kLanes<Real>;
static_assert(kRowBlock % kTileRows == 0, "a row block is whole groups of rows");
static_assert(kPanelCols % kTileCols<float> == 0 && kPanelCols % kTileCols<double> == 0, "a panel is whole tiles");

// ---- packing
// ----------------------------------------------------------------------------------------------------------

// One panel of rows (keys, or values for dO V^T), transposed for the micro-kernel. `count` rows exist, the rest is
// zero.
template <class Element>
void pack_panel(const Element* first_row, int64_t stride_row, int64_t count, int64_t depth,
                Accumulator<Element>* packed) {
  using Real = Accumulator<Element>;
  constexpr int kCols = kTileCols<Real>, kSquare = kLanes<Real>;
  for (int64_t col = 0; col < kPanelCols; col += kSquare) {
    Real* out = packed + col / kCols * depth * kCols + col % kCols;
    for (int64_t d = 0; d < depth; d += kSquare) {
      Vector<Real> square[kSquare];
      for (int i = 0; i < kSquare; ++i)
        square[i] = col + i < count ? load(first_row + (col + i) * stride_row + d) : Vector<Real>{};
      transpose<Real>(square);
      for (int i = 0; i < kSquare; ++i) store(out + (d + i) * kCols, square[i]);
    }
  }
}

// Rows [0, count) as groups [group][depth][kTileRows], each times `factor`; rows up to the last group's end are zero.
template <class Element>
void pack_groups(const Element* first_row, int64_t stride_row, int64_t count, int64_t depth,
                 Accumulator<Element> factor, Accumulator<Element>* packed) {
  using Real = Accumulator<Element>;
  const int64_t padded = (count + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t row = 0; row < padded; ++row) {
    Real* out = packed + row / kTileRows * depth * kTileRows + row % kTileRows;
    for (int64_t d = 0; d < depth; d += kLanes<Real>) {
      alignas(64) Real values[kLanes<Real>];
      store(values, row < count ? load(first_row + row * stride_row + d) * factor : Vector<Real>{});
      for (int lane = 0; lane < kLanes<Real>; ++lane) out[(d + lane) * kTileRows] = values[lane];
    }
  }
}

// ---- the micro-kernel
// -------------------------------------------------------------------------------------------------

template <class Real>
using TileAccumulators = Vector<Real>[kTileRows][kTileVectors];

template <class Real>
ADASPLASH2_INLINE void multiply_tile(const Real* group, const Real* tile, int64_t depth, TileAccumulators<Real>& acc) {
#pragma GCC unroll 6
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) acc[row][v] = Vector<Real>{};
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vector<Real> key[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) key[v] = load(tile + d * kTileCols<Real> + v * kLanes<Real>);
#pragma GCC unroll 6
    for (int row = 0; row < kTileRows; ++row) {
      const Vector<Real> query = broadcast(group[d * kTileRows + row]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) acc[row][v] += query * key[v];
    }
  }
}

// ---- lists of a row block
// ---------------------------------------------------------------------------------------------

template <class Real>
struct RowLists {
  // One element per row of the block.
  alignas(64) Real lower[kRowBlock];  // scores at and below it are out for good
  Real margin[kRowBlock];             // how much lower than the bound on tau: 2 eps where scores are off by up to eps
  Real guess[kRowBlock];              // `lower` where that was guessed, not derived; -inf where it was not
  Real score_max[kRowBlock];          // of the first `checked` scores
  int32_t size[kRowBlock];
  int32_t checked[kRowBlock];
  int32_t limit[kRowBlock];  // prune when size reaches it
  int32_t capacity[kRowBlock];
  bool is_poisoned[kRowBlock];  // has met a NaN or +inf score
  Real* score[kRowBlock];
  int32_t* column[kRowBlock];

  RowLists() = default;
  RowLists(const RowLists&) = delete;
  RowLists& operator=(const RowLists&) = delete;

  void reset(int64_t num_rows) {
    const int64_t num_padded = (num_rows + kTileRows - 1) / kTileRows * kTileRows;
    for (int64_t row = 0; row < num_padded; ++row) {
      if (score_[row].size() == 0) allocate(row, kFirstCapacity);
      lower[row] = row < num_rows ? -kInfinity<Real> : kInfinity<Real>;  // rows past the end take nothing but NaN
      margin[row] = 0;
      is_poisoned[row] = false;
      restart(row, 1);
    }
  }

  // Empties a row's list; its bound stays.
  void restart(int64_t row, int32_t first_limit) {
    guess[row] = -kInfinity<Real>;
    score_max[row] = kLowest<Real>;
    size[row] = checked[row] = 0;
    limit[row] = first_limit;
    ensure_room(row);
  }

  // Room for one more panel, and for whole vectors past the end.
  void ensure_room(int64_t row) {
    if (limit[row] + kSlack <= capacity[row]) return;
    Buffer<Real> old_score = std::move(score_[row]);
    Buffer<int32_t> old_column = std::move(column_[row]);
    score_[row] = Buffer<Real>();
    column_[row] = Buffer<int32_t>();
    allocate(row, 2 * (limit[row] + kSlack));
    std::memcpy(score[row], old_score.data(), size[row] * sizeof(Real));
    std::memcpy(column[row], old_column.data(), size[row] * sizeof(int32_t));
  }

 private:
  static constexpr int32_t kSlack = kPanelCols + 16;
  static constexpr int32_t kFirstCapacity = 1024;
  Buffer<Real> score_[kRowBlock];
  Buffer<int32_t> column_[kRowBlock];

  void allocate(int64_t row, int32_t new_capacity) {
    score[row] = score_[row].reserve(new_capacity);
    column[row] = column_[row].reserve(new_capacity);
    capacity[row] = new_capacity;
  }
};

constexpr int32_t kLeastGrowth = 64;  // entries; a list is pruned again when it has grown by this and doubled

// Raises a row's lower bound by so many steps and drops what it rules out.
template <class Real, Exponent kExponent>
__attribute__((noinline)) void prune(RowLists<Real>& lists, int64_t row, const Power<Real, kExponent>& power, Real unit,
                                     int num_steps = 1) {
  const int32_t size = lists.size[row];
  Real* score = lists.score[row];
  if (size == 0) return;
  pad(score, size);
  const MaxResult<Real> top = list_max(score + lists.checked[row], size - lists.checked[row]);
  if (!top.is_finite || lists.is_poisoned[row]) {
    lists.is_poisoned[row] = true;
    lists.size[row] = lists.checked[row] = 0;
    lists.limit[row] = kPanelCols;
    return;
  }
  const Real score_max = lists.score_max[row] = std::max(lists.score_max[row], top.max);
  Real t = std::max(lists.lower[row] + lists.margin[row], score_max - 1 / unit);
  for (int step = 0; step < num_steps; ++step) {
    const Sums<Real> sums = list_sums<false>(power, score, size, Real(0), t, unit);
    if (!(sums.prob > 1 && sums.weight > 0)) break;
    const Real increase = power.norm_step(sums.prob, sums.weight) / unit;
    t += increase;
    if (increase < lists.margin[row] / 8) break;  // the margin decides
  }
  // What the margin keeps too much is dropped at the end; what rounding could lose would have a gap of this size.
  t -= tau_rounding(size, t, unit);
  lists.lower[row] = std::max(lists.lower[row], t - lists.margin[row]);
  const int32_t kept = static_cast<int32_t>(list_keep_above(score, lists.column[row], size, lists.lower[row]));
  lists.size[row] = lists.checked[row] = kept;
  lists.limit[row] = kept + std::max(kLeastGrowth, kept);
  lists.ensure_room(row);
}

// ---- scanning
// ---------------------------------------------------------------------------------------------------------

// One group of rows against one panel. kEdited: the masks say which keys take part and what is added to their scores.
template <class Real, bool kEdited>
__attribute__((noinline)) void scan_group(const Real* group, const Real* panel, int64_t depth, int32_t first_key,
                                          int64_t first_row, const MaskPanel<Real>* masks, RowLists<Real>& lists) {
  const Real* __restrict lower = lists.lower + first_row;
  for (int sub = 0; sub < kPanelCols / kTileCols<Real>; ++sub) {
    TileAccumulators<Real> acc;
    multiply_tile(group, panel + sub * depth * kTileCols<Real>, depth, acc);
#pragma GCC unroll 6
    for (int row = 0; row < kTileRows; ++row) {
      const Vector<Real> threshold = broadcast(lower[row]);
      uint32_t hits[kTileVectors], any = 0;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        if constexpr (kEdited) {
          const int first = sub * kTileCols<Real> + v * kLanes<Real>;
          if (masks[row].has_bias) acc[row][v] += load(masks[row].bias + first);
          hits[v] = above<Real>(acc[row][v], threshold) & static_cast<uint32_t>(masks[row].allowed >> first);
        } else {
          hits[v] = above<Real>(acc[row][v], threshold);
        }
        any |= hits[v];
      }
      if (__builtin_expect(any != 0, 0)) {
        int32_t size = lists.size[first_row + row];
        Real* score = lists.score[first_row + row];
        int32_t* column = lists.column[first_row + row];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          const int32_t first = first_key + sub * kTileCols<Real> + v * kLanes<Real>;
          size += append_compressed<Real>(score + size, column + size, hits[v], acc[row][v], first);
        }
        lists.size[first_row + row] = size;
      }
    }
  }
}

// Which of a block's rows, and which of their groups.
using RowSet = std::bitset<kRowBlock>;
struct GroupSet {
  uint32_t bits = 0;
  static_assert(kRowBlock / kTileRows <= 32, "a bit per group");

  static GroupSet all() { return {~uint32_t{0}}; }
  void insert(int64_t group) { bits |= uint32_t{1} << group; }
  bool has(int64_t group) const { return (bits >> group & 1) != 0; }
};

// The keys that the rows of a block may see.
struct RowBlock {
  int64_t first_row, num_rows;
  int64_t key_end[kRowBlock];  // per row; 0 past the last row
  int64_t num_panels;          // panels that any row may see

  // Of the rows of a group.
  int64_t least_key_end[kRowBlock / kTileRows], most_key_end[kRowBlock / kTileRows];

  template <class Element>
  RowBlock(const HeadView<Element>& view, int64_t block) {
    first_row = block * kRowBlock;
    num_rows = std::min<int64_t>(kRowBlock, view.problem.num_queries - first_row);
    set_key_ends([&](int64_t row) { return view.key_end(first_row + row); });
  }

  template <class KeyEnd>
  void set_key_ends(KeyEnd key_end_of) {
    int64_t most = 0;
    for (int64_t group = 0; group < kRowBlock / kTileRows; ++group) {
      least_key_end[group] = std::numeric_limits<int64_t>::max();
      most_key_end[group] = 0;
      for (int64_t row = group * kTileRows; row < (group + 1) * kTileRows; ++row) {
        key_end[row] = row < num_rows ? key_end_of(row) : 0;
        if (row < num_rows) least_key_end[group] = std::min(least_key_end[group], key_end[row]);
        most_key_end[group] = std::max(most_key_end[group], key_end[row]);
      }
      most = std::max(most, most_key_end[group]);
    }
    num_panels = panels_of(most);
  }

  int64_t num_groups() const { return (num_rows + kTileRows - 1) / kTileRows; }

  // What a group of rows sees of a panel.
  enum class View { kNothing, kEverything, kPart };
  View group_view(int64_t group, int64_t panel, bool has_mask) const {
    const int64_t first_key = panel * kPanelCols;
    if (most_key_end[group] <= first_key) return View::kNothing;
    return least_key_end[group] >= first_key + kPanelCols && !has_mask ? View::kEverything : View::kPart;
  }

  // The masks of a group of rows over a panel; false if they leave nothing.
  template <class Element>
  bool load_masks(const HeadView<Element>& view, int64_t group, int64_t panel,
                  MaskPanel<Accumulator<Element>>* masks) const {
    uint64_t any = 0;
    for (int64_t row = 0; row < kTileRows; ++row) {
      const int64_t block_row = group * kTileRows + row;
      load_mask_panel(view, first_row + block_row, panel * kPanelCols, key_end[block_row], masks[row]);
      any |= masks[row].allowed;
    }
    return any != 0;
  }
};

// Scans one panel for every row of the block and prunes the lists that have grown.
template <class Element, Exponent kExponent>
void scan_panel(const HeadView<Element>& view, const RowBlock& block, const Accumulator<Element>* groups,
                const Accumulator<Element>* packed_panel, int64_t panel,
                const Power<Accumulator<Element>, kExponent>& power, RowLists<Accumulator<Element>>& lists) {
  using Real = Accumulator<Element>;
  const int64_t depth = view.problem.head_dim;
  const int32_t first_key = static_cast<int32_t>(panel * kPanelCols);
  for (int64_t group = 0; group < block.num_groups(); ++group) {
    const Real* queries = groups + group * depth * kTileRows;
    switch (block.group_view(group, panel, view.problem.mask.data != nullptr)) {
      case RowBlock::View::kNothing:
        continue;
      case RowBlock::View::kEverything:
        scan_group<Real, false>(queries, packed_panel, depth, first_key, group * kTileRows, nullptr, lists);
        break;
      case RowBlock::View::kPart: {
        MaskPanel<Real> masks[kTileRows];
        if (!block.load_masks(view, group, panel, masks)) continue;
        scan_group<Real, true>(queries, packed_panel, depth, first_key, group * kTileRows, masks, lists);
        break;
      }
    }
    for (int64_t row = group * kTileRows; row < (group + 1) * kTileRows; ++row) {
      if (__builtin_expect(lists.size[row] >= lists.limit[row], 0)) prune(lists, row, power, view.units.unit);
    }
  }
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
