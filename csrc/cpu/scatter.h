// Products with the transpose of a support: sum_i w_ij x_i for every key j, x_i a row of query or grad_out.
//
//   scatter_sum, scatter_two_sums   row after row adds to the sums of its keys, in memory
//   RowGroup                        up to 64 rows at a time: what they add to a key is added up in registers. Their
//                                   entries are found by bits, which pays where a key has entries of several rows.
//
// Both add to a key's sums in the order of the rows, so their results are the same bits.
#pragma once

#include "cpu/gather.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

// sums[column[j]][0 .. dim) += weight[j] * row, j < count
template <class Element>
ADASPLASH2_INLINE void scatter_sum(const Element* row, int64_t dim, const int32_t* column,
                                   const Accumulator<Element>* weight, int64_t count, Accumulator<Element>* sums) {
  using Real = Accumulator<Element>;
  for_pieces<Real>(dim, [&](int64_t first, auto vectors) {
    constexpr int kVectors = vectors;
    Vector<Real> x[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) x[v] = load(row + first + v * kLanes<Real>);
    for (int64_t j = 0; j < count; ++j) {
      Real* sum = sums + column[j] * dim + first;
      const Vector<Real> w = broadcast(weight[j]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(sum + v * kLanes<Real>, load(sum + v * kLanes<Real>) + w * x[v]);
    }
  });
}

// Two scatter_sum at a time, of rows of kVectors vectors, as long as column[j] >= first_column; returns how many j. One
// loop, because its end is what costs: there are a few entries only, and nothing foretells how many.
template <int kVectors, class Element>
ADASPLASH2_INLINE int64_t scatter_two_sums(const Element* row0, const Element* row1, const int32_t* column,
                                           const Accumulator<Element>* weight0, const Accumulator<Element>* weight1,
                                           int64_t most, int64_t first_column, Accumulator<Element>* sums0,
                                           Accumulator<Element>* sums1) {
  using Real = Accumulator<Element>;
  constexpr int64_t kDim = kVectors * kLanes<Real>;
  Vector<Real> x0[kVectors], x1[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    x0[v] = load(row0 + v * kLanes<Real>);
    x1[v] = load(row1 + v * kLanes<Real>);
  }
  int64_t j = 0;
  for (; j < most && column[j] >= first_column; ++j) {
    Real *sum0 = sums0 + column[j] * kDim, *sum1 = sums1 + column[j] * kDim;
    const Vector<Real> w0 = broadcast(weight0[j]), w1 = broadcast(weight1[j]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store(sum0 + v * kLanes<Real>, load(sum0 + v * kLanes<Real>) + w0 * x0[v]);
      store(sum1 + v * kLanes<Real>, load(sum1 + v * kLanes<Real>) + w1 * x1[v]);
    }
  }
  return j;
}

// What is left of a row's entries in a range of keys: panels from the last to the first, a panel's keys in order.
template <class Real>
struct Segment {
  int64_t row, size;
  const int32_t* column;
  const Real *prob, *grad_score;

  void prefetch() const {
    constexpr int64_t kLine = 64 / sizeof(Real);
    for (int64_t j = 0; j < size; j += kLine) {
      __builtin_prefetch(column + j, 0, 2);
      __builtin_prefetch(prob + j, 0, 2);
      __builtin_prefetch(grad_score + j, 0, 2);
    }
  }
  void drop(int64_t count) {
    size -= count;
    column += count;
    prob += count;
    grad_score += count;
  }

  // Bit k: there is an entry of the key first_key + k. The segment has no keys behind this panel.
  ADASPLASH2_INLINE uint64_t panel_bits(int64_t first_key) const {
#ifdef ADASPLASH2_AVX512
    __m512i bits = _mm512_setzero_si512();
    for (int64_t j = 0; j < size; j += 16) {
      const __mmask16 exists = _bzhi_u32(0xffff, static_cast<uint32_t>(std::min<int64_t>(size - j, 16)));
      const __m512i key = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(exists, column + j),
                                           _mm512_set1_epi32(static_cast<int32_t>(first_key)));
      const __mmask16 is_in = _mm512_mask_cmpge_epi32_mask(exists, key, _mm512_setzero_si512());
      const auto add_bits = [&](__mmask8 mask, __m256i of) {
        bits = _mm512_or_si512(bits, _mm512_maskz_sllv_epi64(mask, _mm512_set1_epi64(1), _mm512_cvtepu32_epi64(of)));
      };
      add_bits(static_cast<__mmask8>(is_in), _mm512_castsi512_si256(key));
      add_bits(static_cast<__mmask8>(is_in >> 8), _mm512_extracti64x4_epi64(key, 1));
      if (is_in != 0xffff) break;
    }
    return static_cast<uint64_t>(_mm512_reduce_or_epi64(bits));
#else
    uint64_t bits = 0;
    for (int64_t j = 0; j < size && column[j] >= first_key; ++j) bits |= uint64_t{1} << (column[j] - first_key);
    return bits;
#endif
  }
};

// Bit j of word i becomes bit i of word j: squares of 32, 16, .. 1 bits change places across the diagonal.
inline void transpose_bits(uint64_t (&words)[64]) {
  uint64_t low = ~uint64_t{0} >> 32;
  for (int width = 32; width > 0; width /= 2, low ^= low << width) {
    for (int first = 0; first < 64; first += 2 * width) {
      for (int i = first; i < first + width; ++i) {
        const uint64_t difference = (words[i] >> width ^ words[i + width]) & low;
        words[i] ^= difference << width;
        words[i + width] ^= difference;
      }
    }
  }
}

// A few rows of query and grad_out and their entries in a range of keys.
template <class Element>
class RowGroup {
  using Real = Accumulator<Element>;
  static constexpr int64_t kMostRows = 64;

 public:
  RowGroup(int64_t key_dim, int64_t value_dim) : key_dim_(key_dim), value_dim_(value_dim) {
    constexpr int64_t kRowBytes = 32 << 10;  // of all rows: an L1 cache
    most_rows = std::clamp<int64_t>(kRowBytes / ((key_dim + value_dim) * sizeof(Real)), kMostRows / 4, kMostRows);
    query_.reserve(most_rows * key_dim);
    grad_out_.reserve(most_rows * value_dim);
  }

  int64_t most_rows;

  // query and grad_out: functions that give a segment's row.
  template <class Query, class GradOut>
  void set(Segment<Real>* segments, int64_t num_rows, Query query, GradOut grad_out) {
    segments_ = segments;
    num_rows_ = num_rows;
    for (int64_t i = 0; i < num_rows; ++i) {
      convert_row(query(segments[i]), key_dim_, query_.data() + i * key_dim_);
      convert_row(grad_out(segments[i]), value_dim_, grad_out_.data() + i * value_dim_);
    }
  }

  // Adds the rows' entries of one panel to the sums of its keys, and drops them. Either sums may be null.
  void add_panel(int64_t first_key, Real* key_sums, Real* value_sums) {
    for (int64_t i = 0; i < num_rows_; ++i) rows_of_[i] = keys_of_[i] = segments_[i].panel_bits(first_key);
    std::fill(rows_of_ + num_rows_, rows_of_ + kMostRows, 0);
    transpose_bits(rows_of_);
    const auto add = [&](auto key_vectors, int64_t key_column, auto value_vectors, int64_t value_column) {
      add_columns<key_vectors, value_vectors>(key_column, value_column, key_sums, value_sums);
    };
    const auto add_both = [&](auto vectors) { add(vectors, 0, vectors, 0); };
    const bool adds_both = key_sums != nullptr && value_sums != nullptr && key_dim_ == value_dim_;
    const int64_t num_vectors = adds_both ? key_dim_ / kLanes<Real> : 0;
    constexpr int kSums = kVectorBytes == 64 ? 16 : 8;  // in registers, and as many registers for the rest
    if (num_vectors == 2) {
      add_both(std::integral_constant<int, 2>());
    } else if (num_vectors == 4) {
      add_both(std::integral_constant<int, 4>());
    } else if (num_vectors == 8 && kSums == 16) {
      add_both(std::integral_constant<int, kSums / 2>());
    } else {
      constexpr std::integral_constant<int, 0> kNone;
      if (key_sums != nullptr)
        for_pieces<Real>(key_dim_, [&](int64_t first, auto vectors) { add(vectors, first, kNone, 0); });
      if (value_sums != nullptr)
        for_pieces<Real>(value_dim_, [&](int64_t first, auto vectors) { add(kNone, 0, vectors, first); });
    }
    for (int64_t i = 0; i < num_rows_; ++i) segments_[i].drop(__builtin_popcountll(keys_of_[i]));
  }

 private:
  // Of kKeyVectors and kValueVectors vectors of the sums, from a column of each on.
  template <int kKeyVectors, int kValueVectors>
  ADASPLASH2_INLINE void add_columns(int64_t key_column, int64_t value_column, Real* key_sums, Real* value_sums) {
    const Real *query = query_.data() + key_column, *grad_out = grad_out_.data() + value_column;
    for (int64_t key = 0; key < kPanelCols; ++key) {
      uint64_t rows = rows_of_[key];
      if (rows == 0) continue;
      const uint64_t before = (uint64_t{1} << key) - 1;
      Real* key_sum = kKeyVectors > 0 ? key_sums + key * key_dim_ + key_column : nullptr;
      Real* value_sum = kValueVectors > 0 ? value_sums + key * value_dim_ + value_column : nullptr;
      Vector<Real> of_key[kKeyVectors + 1], of_value[kValueVectors + 1];
#pragma GCC unroll 8
      for (int v = 0; v < kKeyVectors; ++v) of_key[v] = load(key_sum + v * kLanes<Real>);
#pragma GCC unroll 8
      for (int v = 0; v < kValueVectors; ++v) of_value[v] = load(value_sum + v * kLanes<Real>);
      do {
        const int i = __builtin_ctzll(rows);
        rows &= rows - 1;
        const int64_t entry = __builtin_popcountll(keys_of_[i] & before);
        if constexpr (kKeyVectors > 0) {
          const Vector<Real> weight = broadcast(segments_[i].grad_score[entry]);
#pragma GCC unroll 8
          for (int v = 0; v < kKeyVectors; ++v) of_key[v] += weight * load(query + i * key_dim_ + v * kLanes<Real>);
        }
        if constexpr (kValueVectors > 0) {
          const Vector<Real> weight = broadcast(segments_[i].prob[entry]);
#pragma GCC unroll 8
          for (int v = 0; v < kValueVectors; ++v)
            of_value[v] += weight * load(grad_out + i * value_dim_ + v * kLanes<Real>);
        }
      } while (rows != 0);
#pragma GCC unroll 8
      for (int v = 0; v < kKeyVectors; ++v) store(key_sum + v * kLanes<Real>, of_key[v]);
#pragma GCC unroll 8
      for (int v = 0; v < kValueVectors; ++v) store(value_sum + v * kLanes<Real>, of_value[v]);
    }
  }

  int64_t key_dim_, value_dim_, num_rows_ = 0;
  Segment<Real>* segments_ = nullptr;
  Buffer<Real> query_, grad_out_;                      // [most_rows, D], [most_rows, Dv]
  uint64_t keys_of_[kMostRows], rows_of_[kPanelCols];  // of every row its keys in a panel, of every key its rows
};

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
