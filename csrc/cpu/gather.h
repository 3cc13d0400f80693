// Products with the few rows of a matrix that a support names: sum_j p_j row(c_j), and <x, row(c_j)> for every j.
#pragma once

#include "cpu/head_view.h"
#include "cpu/support_layout.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

template <class Element>
struct MatrixView {
  const Element* data;
  int64_t stride_row;
  const Element* row(int64_t index) const { return data + index * stride_row; }
};

template <int kVectors, class Element>
ADASPLASH2_INLINE void prefetch_row(const Element* row) {
  constexpr int kBytes = kVectors * kLanes<Accumulator<Element>> * static_cast<int>(sizeof(Element));
#pragma GCC unroll 16
  for (int line = 0; line < (kBytes + 63) / 64; ++line)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + 64 * line);
}

// Splits a row of `dim` elements into pieces of kMost (at most 8), .., 2 and 1 vectors: function(first element,
// vectors).
template <class Real, int kMost = 8, class Function>
ADASPLASH2_INLINE void for_pieces(int64_t dim, Function function) {
  int64_t first = 0;
  const auto take = [&](auto vectors) {
    if constexpr (vectors <= kMost) {
      for (; dim - first >= vectors * kLanes<Real>; first += vectors * kLanes<Real>) function(first, vectors);
    }
  };
  take(std::integral_constant<int, 8>());
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
}

constexpr int kPrefetchAhead = 8;

// out[0 .. dim) (+)= sum_j weight_of(j) * matrix.row(row_of(j)), j < count
template <bool kAccumulate, class Element, class RowOf, class WeightOf>
ADASPLASH2_INLINE void gather_sum(const MatrixView<Element>& matrix, int64_t dim, int64_t count, RowOf row_of,
                                  WeightOf weight_of, Accumulator<Element>* out) {
  using Real = Accumulator<Element>;
  for_pieces<Real>(dim, [&](int64_t first, auto vectors) {
    constexpr int kVectors = vectors;
    // Two sets of accumulators: one chain of dependent additions would be longer than the loads take.
    Vector<Real> even[kVectors], odd[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      even[v] = kAccumulate ? load(out + first + v * kLanes<Real>) : Vector<Real>{};
      odd[v] = Vector<Real>{};
    }
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      const int64_t ahead = j + kPrefetchAhead;
      if (ahead + 1 < count) {
        prefetch_row<kVectors>(matrix.row(row_of(ahead)) + first);
        prefetch_row<kVectors>(matrix.row(row_of(ahead + 1)) + first);
      }
      const Element *row0 = matrix.row(row_of(j)) + first, *row1 = matrix.row(row_of(j + 1)) + first;
      const Vector<Real> weight0 = broadcast(weight_of(j)), weight1 = broadcast(weight_of(j + 1));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) even[v] += weight0 * load(row0 + v * kLanes<Real>);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) odd[v] += weight1 * load(row1 + v * kLanes<Real>);
    }
    if (j < count) {
      const Element* row0 = matrix.row(row_of(j)) + first;
      const Vector<Real> weight0 = broadcast(weight_of(j));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) even[v] += weight0 * load(row0 + v * kLanes<Real>);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + first + v * kLanes<Real>, even[v] + odd[v]);
  });
}

// The same with rows and weights in arrays.
template <bool kAccumulate, class Element>
ADASPLASH2_INLINE void gather_sum(const MatrixView<Element>& matrix, int64_t dim, const int32_t* row,
                                  const Accumulator<Element>* weight, int64_t count, Accumulator<Element>* out) {
  gather_sum<kAccumulate>(
      matrix, dim, count, [=](int64_t j) { return row[j]; }, [=](int64_t j) { return weight[j]; }, out);
}

// Sums of kLanes vectors in one vector, by a tree of pairwise additions of neighbours.
template <class Real, int kCount>
ADASPLASH2_INLINE Vector<Real> sums_of(const Vector<Real>* x) {
  constexpr int kAll = kLanes<Real>;
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    const Vector<Real> a = sums_of<Real, kCount / 2>(x), b = sums_of<Real, kCount / 2>(x + kCount / 2);
    Bits<Real> even, odd;
    for (int lane = 0; lane < kAll; ++lane) {
      even[lane] = 2 * lane;
      odd[lane] = 2 * lane + 1;
    }
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  }
}

// product[j] = <x, matrix.row(column[j])>; product is written up to the next whole vector.
template <class Element>
ADASPLASH2_INLINE void gather_dot(const Accumulator<Element>* x, const MatrixView<Element>& matrix, int64_t dim,
                                  const int32_t* column, int64_t count, Accumulator<Element>* product) {
  using Real = Accumulator<Element>;
  constexpr int kAll = kLanes<Real>;
  for_pieces<Real>(dim, [&](int64_t first, auto vectors) {
    constexpr int kVectors = vectors;
    Vector<Real> left[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) left[v] = load(x + first + v * kAll);
    for (int64_t j = 0; j < count; j += kAll) {
      Vector<Real> partial[kAll];
#pragma GCC unroll 16
      for (int i = 0; i < kAll; ++i) {
        if (j + kAll + i < count) prefetch_row<kVectors>(matrix.row(column[j + kAll + i]) + first);
        const Element* row = matrix.row(column[j + i < count ? j + i : j]) + first;
        Vector<Real> sum = left[0] * load(row);
#pragma GCC unroll 8
        for (int v = 1; v < kVectors; ++v) sum += left[v] * load(row + v * kAll);
        partial[i] = sum;
      }
      const Vector<Real> sums = sums_of<Real, kAll>(partial);
      store(product + j, first == 0 ? sums : load(product + j) + sums);
    }
  });
}

// The keys of one row: `size` columns in the order in which the scan left them, panels from the last to the first.
struct ColumnList {
  const int32_t* column;
  int64_t size;
};

// Rows with long lists are taken by ranges of keys, so that what a block of rows gathers of a matrix stays in the cache
// from one row to the next; a range should still have this many entries of a row, to fill the vectors of its products.
constexpr int64_t kEntriesPerRange = 32;
constexpr int64_t kKeysPerRange = 512;  // at least

// function(row, its first entry, number of entries) for every row and range: ranges from the last to the first, the
// rows in order within a range. The matrix' rows that the next call names are on their way while one runs.
template <class Element, class Function>
ADASPLASH2_INLINE void for_key_ranges(const ColumnList* lists, int64_t num_rows, int64_t num_keys,
                                      const MatrixView<Element>& matrix, int64_t dim, Function function) {
  constexpr int64_t kPrefetchedRows = 24;
  const int64_t line = 64 / sizeof(Element);
  int64_t done[kRowBlock], num_entries = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    done[row] = 0;
    num_entries += lists[row].size;
  }
  const int64_t fitting = num_entries / (std::max<int64_t>(num_rows, 1) * kEntriesPerRange);
  const int64_t num_ranges = std::clamp<int64_t>(fitting, 1, (num_keys + kKeysPerRange - 1) / kKeysPerRange);
  const int64_t num_panels = (num_keys + kPanelCols - 1) / kPanelCols;
  for (int64_t range = num_ranges - 1; range >= 0; --range) {
    const int32_t first_key = static_cast<int32_t>(num_panels * range / num_ranges * kPanelCols);
    for (int64_t row = 0; row < num_rows; ++row) {
      if (num_ranges == 1 && row + 1 < num_rows) {
        const ColumnList& next = lists[row + 1];
        for (int64_t j = 0; j < std::min(next.size, kPrefetchedRows); ++j) {
          for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(matrix.row(next.column[j]) + d);
        }
      }
      const ColumnList& list = lists[row];
      const int64_t begin = done[row];
      // Panels are in order, so the columns of the ranges that are left lie together.
      const auto is_ahead = [=](int32_t column) { return column >= first_key; };
      done[row] = range == 0
                      ? list.size
                      : std::partition_point(list.column + begin, list.column + list.size, is_ahead) - list.column;
      if (done[row] > begin) function(row, begin, done[row] - begin);
    }
  }
}

template <class Element>
ADASPLASH2_INLINE void convert_row(const Accumulator<Element>* from, int64_t dim, Element* to) {
  for (int64_t d = 0; d < dim; d += kLanes<Accumulator<Element>>) store(to + d, load(from + d));
}

template <class Element>
ADASPLASH2_INLINE void widen_row(const Element* from, int64_t dim, Accumulator<Element>* to) {
  for (int64_t d = 0; d < dim; d += kLanes<Accumulator<Element>>) store(to + d, load(from + d));
}

template <class Element>
ADASPLASH2_INLINE void fill_row(Element* row, int64_t dim, Accumulator<Element> value) {
  for (int64_t d = 0; d < dim; d += kLanes<Accumulator<Element>>) store(row + d, broadcast(value));
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
