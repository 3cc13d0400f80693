// Row blocks whose rows keep so many keys that lists do not pay: scores and probabilities in strips of whole rows that
// fit the cache, products by register tiles. Memory stays O(N): one strip a thread.
#pragma once

#include "cpu/gather.h"
#include "cpu/scan.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

// Of a strip's scores: with one panel of K and V they fit the L2 of every server core. Long rows rather leave it: a
// strip fetches all of K and V (and adds to all of dK and dV), which must be worth it for its few rows.
constexpr int64_t kStripBytes = 512 << 10, kMostStripBytes = 4 << 20;
constexpr int64_t kLeastStripRows = 4 * kTileRows;

constexpr int64_t kStripPadding = 32;  // past the last column: whole groups of columns may be read, and the rows of a
                                       // column do not all fall into one set of the cache

// A strip: `rows` rows of scores over the keys of whole panels.
template <class Real>
struct Strip {
  Buffer<Real> data;
  int64_t stride = 0, rows = 0;

  static int64_t stride_for(int64_t num_panels) { return num_panels * kPanelCols + kStripPadding; }

  static int64_t rows_for(int64_t num_panels) {
    const int64_t row_bytes = stride_for(num_panels) * static_cast<int64_t>(sizeof(Real));
    const int64_t fitting = std::max(kStripBytes / row_bytes, std::min(kMostStripBytes / row_bytes, kLeastStripRows));
    return std::clamp<int64_t>(fitting / kTileRows * kTileRows, kTileRows, kRowBlock);
  }

  void reserve(int64_t num_panels) {
    stride = stride_for(num_panels);
    rows = rows_for(num_panels);
    data.reserve(rows * stride + kLanes<Real>);
  }
  Real* row(int64_t index) { return data.data() + index * stride; }
};

template <class Real>
__attribute__((noinline)) void multiply_to(const Real* group, const Real* panel, int64_t depth, Real* out,
                                           int64_t stride) {
  for (int sub = 0; sub < kPanelCols / kTileCols<Real>; ++sub) {
    TileAccumulators<Real> acc;
    multiply_tile(group, panel + sub * depth * kTileCols<Real>, depth, acc);
#pragma GCC unroll 6
    for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        store(out + row * stride + sub * kTileCols<Real> + v * kLanes<Real>, acc[row][v]);
      }
    }
  }
}

// The scores u of the rows [first, first + strip.rows) of a block; keys that take no part get the lowest number there
// is, or -inf.
template <class Element>
void score_strip(const HeadView<Element>& view, const RowBlock& block, int64_t first,
                 const Accumulator<Element>* groups, const Accumulator<Element>* packed_keys,
                 Strip<Accumulator<Element>>& strip) {
  using Real = Accumulator<Element>;
  const int64_t depth = view.problem.head_dim, last = std::min(block.num_rows, first + strip.rows);
  for (int64_t panel = 0; panel < block.num_panels; ++panel) {
    const Real* packed_panel = packed_keys + panel * depth * kPanelCols;
    for (int64_t row = first; row < last; row += kTileRows) {
      Real* out = strip.row(row - first) + panel * kPanelCols;
      MaskPanel<Real> masks[kTileRows];
      const auto seen = block.group_view(row / kTileRows, panel, view.problem.mask.data != nullptr);
      const bool is_edited = seen == RowBlock::View::kPart;
      if (seen == RowBlock::View::kNothing || (is_edited && !block.load_masks(view, row / kTileRows, panel, masks))) {
        for (int i = 0; i < kTileRows; ++i) fill_row(out + i * strip.stride, kPanelCols, kLowest<Real>);
        continue;
      }
      multiply_to(groups + row / kTileRows * depth * kTileRows, packed_panel, depth, out, strip.stride);
      if (!is_edited) continue;
      for (int i = 0; i < kTileRows; ++i) {
        Real* scores = out + i * strip.stride;
        for (int j = 0; j < kPanelCols; ++j) {
          const Real score = masks[i].has_bias ? scores[j] + masks[i].bias[j] : scores[j];
          scores[j] = (masks[i].allowed >> j & 1) != 0 ? score : kLowest<Real>;
        }
      }
    }
  }
}

// out[i][0 .. dim) += sum_k a[i * stride_i + k * stride_k] * matrix.row(k), for kTileRows rows i and k < count.
template <class Element>
__attribute__((noinline)) void accumulate_tile(const Accumulator<Element>* a, int64_t stride_i, int64_t stride_k,
                                               const MatrixView<Element>& matrix, int64_t count, int64_t dim,
                                               Accumulator<Element>* out, int64_t stride_out) {
  using Real = Accumulator<Element>;
  for_pieces<Real, kTileVectors>(dim, [&](int64_t first, auto vectors) {
    constexpr int kVectors = vectors;
    Vector<Real> acc[kTileRows][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = load(out + i * stride_out + first + v * kLanes<Real>);
    }
    for (int64_t k = 0; k < count; ++k) {
      Vector<Real> right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = load(matrix.row(k) + first + v * kLanes<Real>);
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
        const Vector<Real> left = broadcast(a[i * stride_i + k * stride_k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] += left * right[v];
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(out + i * stride_out + first + v * kLanes<Real>, acc[i][v]);
    }
  });
}

template <class Element>
bool all_finite(const MatrixView<Element>& matrix, int64_t count, int64_t dim) {
  Vector<Accumulator<Element>> zero = {};
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t d = 0; d < dim; d += kLanes<Accumulator<Element>>)
      zero += load(matrix.row(row) + d) * Accumulator<Element>(0);
  }
  const auto sum = reduce_add<Accumulator<Element>>(zero);
  return sum == sum;
}

// out[i][0 .. dim) += sum_k a[i * stride_a + k] * matrix.row(k) for a group of rows i. Where the matrix is not finite,
// rows with a zero weight must not be touched (0 * NaN is NaN).
template <class Element>
void accumulate_rows(const Accumulator<Element>* a, int64_t stride_a, const MatrixView<Element>& matrix, int64_t count,
                     int64_t dim, Accumulator<Element>* out, bool is_finite) {
  if (is_finite) return accumulate_tile(a, stride_a, 1, matrix, count, dim, out, dim);
  for (int64_t i = 0; i < kTileRows; ++i) {
    for (int64_t k = 0; k < count; ++k) {
      if (a[i * stride_a + k] == 0) continue;
      for (int64_t d = 0; d < dim; d += kLanes<Accumulator<Element>>) {
        store(out + i * dim + d, load(out + i * dim + d) + load(matrix.row(k) + d) * a[i * stride_a + k]);
      }
    }
  }
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
