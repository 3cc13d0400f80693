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
constexpr int kSummedVectors =
    kVectorBytes == 64 ? 8 : 4;  // of a sum: two sets of accumulators in half of the registers

// out[0 .. dim) += sum_j weight[j] * matrix.row(column[j]), j < count; is_cached: the rows are in the L2 cache.
template <class Element>
ADASPLASH2_INLINE void gather_sum(const MatrixView<Element>& matrix, int64_t dim, const int32_t* column,
                                  const Accumulator<Element>* weight, int64_t count, bool is_cached,
                                  Accumulator<Element>* out) {
  using Real = Accumulator<Element>;
  for_pieces<Real, kSummedVectors>(dim, [&](int64_t first, auto vectors) {
    constexpr int kVectors = vectors;
    // Two sets of accumulators: one chain of dependent additions would be longer than the loads take.
    Vector<Real> even[kVectors], odd[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      even[v] = load(out + first + v * kLanes<Real>);
      odd[v] = Vector<Real>{};
    }
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      const int64_t ahead = j + kPrefetchAhead;
      if (!is_cached && ahead + 1 < count) {
        prefetch_row<kVectors>(matrix.row(column[ahead]) + first);
        prefetch_row<kVectors>(matrix.row(column[ahead + 1]) + first);
      }
      const Element *row0 = matrix.row(column[j]) + first, *row1 = matrix.row(column[j + 1]) + first;
      const Vector<Real> weight0 = broadcast(weight[j]), weight1 = broadcast(weight[j + 1]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) even[v] += weight0 * load(row0 + v * kLanes<Real>);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) odd[v] += weight1 * load(row1 + v * kLanes<Real>);
    }
    if (j < count) {
      const Element* row0 = matrix.row(column[j]) + first;
      const Vector<Real> weight0 = broadcast(weight[j]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) even[v] += weight0 * load(row0 + v * kLanes<Real>);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + first + v * kLanes<Real>, even[v] + odd[v]);
  });
}

// Sums of kLanes vectors in one vector, by a tree of pairwise additions of neighbours. AVX2 shuffles two vectors within
// their 128-bit lanes only: there a step between lanes, which adds halves, comes last.
template <class Real, int kCount>
ADASPLASH2_INLINE Vector<Real> sums_of(const Vector<Real>* x) {
  constexpr int kAll = kLanes<Real>, kLane = kVectorBytes == 32 ? kAll / 2 : kAll;
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    const Vector<Real> a = sums_of<Real, kCount / 2>(x), b = sums_of<Real, kCount / 2>(x + kCount / 2);
    constexpr int kStep = kCount > kLane ? kLane : 1;  // between the two that are added
    Bits<Real> first, second;
    for (int lane = 0; lane < kAll; ++lane) {
      const int width = kCount > kLane ? kAll : kLane, index = lane % width * 2;  // a's part of the width, then b's
      const int of_pairs = kStep == 1 ? index % width : lane % kLane;
      first[lane] = lane / width * width + of_pairs + (index < width ? 0 : kAll);
      second[lane] = first[lane] + kStep;
    }
    return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
  }
}

// Of the products of a row with kVectors vectors of x, sums whose total is the dot product.
template <class Element, int kVectors>
struct FloatDot {
  using Real = Accumulator<Element>;
  Vector<Real> left[kVectors];

  ADASPLASH2_INLINE explicit FloatDot(const Real* x) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) left[v] = load(x + v * kLanes<Real>);
  }
  ADASPLASH2_INLINE Vector<Real> operator()(const Element* row) const {
    Vector<Real> sum = left[0] * load(row);
#pragma GCC unroll 8
    for (int v = 1; v < kVectors; ++v) sum += left[v] * load(row + v * kLanes<Real>);
    return sum;
  }
};

#ifdef ADASPLASH2_AVX512
const bool kHasBFloat16Dot =
    __builtin_cpu_supports("avx512bf16") != 0;  // Zen 4, Cooper Lake, Sapphire Rapids and newer

// x must hold numbers of bfloat16. Products of two are exact in float; numbers below 2^-126 count as zero.
template <int kVectors>
struct BFloat16Dot {
  static constexpr int kWords = kVectors / 2;
  __m512i left[kWords];

  ADASPLASH2_INLINE explicit BFloat16Dot(const float* x) {
#pragma GCC unroll 4
    for (int w = 0; w < kWords; ++w) {
      const auto upper = [&](int half) {
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(x + w * 32 + half * 16), 16));
      };
      left[w] = _mm512_inserti64x4(_mm512_castsi256_si512(upper(0)), upper(1), 1);
    }
  }
  ADASPLASH2_INLINE Vector<float> operator()(const BFloat16* row) const {
    Vector<float> sum = {};
#pragma GCC unroll 4
    for (int w = 0; w < kWords; ++w) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left[w]), "m"(*reinterpret_cast<const __m512i_u*>(row + w * 32)));
    }
    return sum;
  }
};
#endif

// product[j] = <x, matrix.row(column[j])>; product is written up to the next whole vector. is_cached: as above.
// x has numbers of the type Element, as floats: a row of its type, or one times a power of two.
template <class Element>
ADASPLASH2_INLINE void gather_dot(const Accumulator<Element>* x, const MatrixView<Element>& matrix, int64_t dim,
                                  const int32_t* column, int64_t count, bool is_cached, Accumulator<Element>* product) {
  using Real = Accumulator<Element>;
  constexpr int kAll = kLanes<Real>;
  for_pieces<Real>(dim, [&](int64_t first, auto vectors) {
    constexpr int kVectors = vectors;
    const auto multiply_all = [&](const auto& dot) __attribute__((always_inline)) {
      // kWhole: there are as many entries as fill this vector of products and the next one.
      const auto multiply = [&](int64_t j, auto whole) __attribute__((always_inline)) {
        constexpr bool kWhole = whole;
        Vector<Real> partial[kAll];
#pragma GCC unroll 16
        for (int i = 0; i < kAll; ++i) {
          if (!is_cached && (kWhole || j + kAll + i < count))
            prefetch_row<kVectors>(matrix.row(column[j + kAll + i]) + first);
          partial[i] = dot(matrix.row(column[kWhole || j + i < count ? j + i : j]) + first);
        }
        const Vector<Real> sums = sums_of<Real, kAll>(partial);
        store(product + j, first == 0 ? sums : load(product + j) + sums);
      };
      int64_t j = 0;
      for (; j + 2 * kAll <= count; j += kAll) multiply(j, std::true_type());
      for (; j < count; j += kAll) multiply(j, std::false_type());
    };
#ifdef ADASPLASH2_AVX512
    if constexpr (std::is_same_v<Element, BFloat16> && kVectors > 1) {
      if (kHasBFloat16Dot) return multiply_all(BFloat16Dot<kVectors>(x + first));
    }
#endif
    multiply_all(FloatDot<Element, kVectors>(x + first));
  });
}

// The keys of one row, in the order in which the scan left them (panels from the last to the first), and a number for
// each of them: what is summed with or what comes out.
template <class Real>
struct EntryList {
  const int32_t* column;
  Real* value;
  int64_t size;
};

// Rows with long lists are taken by ranges of keys, so that what a block of rows gathers of a matrix stays in the cache
// from one row to the next; a range should still have this many entries of a row, to fill the vectors of its products.
constexpr int64_t kEntriesPerRange = 32;
constexpr int64_t kKeysPerRange = 512;       // at least
constexpr int64_t kCachedBytes = 512 << 10;  // of a matrix that stays in the L2 cache as a whole

// Of a list, from `begin` on: the first column below first_key, a multiple of kPanelCols. Panels are in order, so the
// columns of the ranges that are left lie together. Not a binary search, whose every step may wait for memory.
inline const int32_t* keys_from(const int32_t* begin, const int32_t* end, int64_t first_key) {
  constexpr int64_t kStep = 16;
  while (end - begin >= kStep && begin[kStep - 1] >= first_key) begin += kStep;
  while (begin < end && *begin >= first_key) ++begin;
  return begin;
}

// function(row, columns, values, number of entries, is_cached) for every row and range: ranges from the last to the
// first, the rows in order within a range, whose part of the matrix then is in the L2 cache. What the next calls read
// is on its way while one runs: of the lists, and, where the lists are too short for ranges, the rows of the matrix
// too.
template <class Element, class Function>
ADASPLASH2_INLINE void for_key_ranges(const EntryList<Accumulator<Element>>* lists, int64_t num_rows, int64_t num_keys,
                                      const MatrixView<Element>& matrix, int64_t dim, Function function) {
  constexpr int64_t kPrefetchedRows = 24, kListsAhead = 3;
  const int64_t line = 64 / sizeof(Element);
  int64_t done[kGatherRows], num_entries = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    done[row] = 0;
    num_entries += lists[row].size;
  }
  const int64_t fitting = num_entries / (std::max<int64_t>(num_rows, 1) * kEntriesPerRange);
  const int64_t num_ranges = std::clamp<int64_t>(fitting, 1, (num_keys + kKeysPerRange - 1) / kKeysPerRange);
  const int64_t num_panels = panels_of(num_keys);
  const bool is_cached = num_ranges > 1 || num_keys * dim * static_cast<int64_t>(sizeof(Element)) <= kCachedBytes;
  for (int64_t range = num_ranges - 1; range >= 0; --range) {
    const int64_t first_key = num_panels * range / num_ranges * kPanelCols;
    for (int64_t row = 0; row < num_rows; ++row) {
      if (row + kListsAhead < num_rows) {
        const auto& later = lists[row + kListsAhead];
        const int64_t from = done[row + kListsAhead], to = std::min(later.size, from + later.size / num_ranges);
        for (int64_t j = from; j < to; j += 16) {
          __builtin_prefetch(later.column + j);
          __builtin_prefetch(later.value + j);
        }
      }
      if (!is_cached && row + 1 < num_rows) {
        const auto& next = lists[row + 1];
        for (int64_t j = 0; j < std::min(next.size, kPrefetchedRows); ++j) {
          for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(matrix.row(next.column[j]) + d);
        }
      }
      const auto& list = lists[row];
      const int64_t begin = done[row];
      done[row] =
          range == 0 ? list.size : keys_from(list.column + begin, list.column + list.size, first_key) - list.column;
      if (done[row] > begin) function(row, list.column + begin, list.value + begin, done[row] - begin, is_cached);
    }
  }
}

// Between an element type and its accumulation type, either way.
template <class From, class To>
ADASPLASH2_INLINE void convert_row(const From* from, int64_t dim, To* to) {
  for (int64_t d = 0; d < dim; d += kLanes<Accumulator<To>>) store(to + d, load(from + d));
}

template <class Element>
ADASPLASH2_INLINE void fill_row(Element* row, int64_t dim, Accumulator<Element> value) {
  for (int64_t d = 0; d < dim; d += kLanes<Accumulator<Element>>) store(row + d, broadcast(value));
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
