// The scan in integers: of 8 bits on AVX-512 machines with VNNI, four times the multiplications of float, and of 16
// bits with AVX2, twice as many.
//
// It only chooses candidates; their scores are then computed again from the original rows, so results are exact. With
// q = q^ + dq and k = k^ + dk (quantised value and its rounding residual), |<q, k> - <q^, k^>| <= eps_i with
//
//   eps_i = |q_i| max_j |dk_j| + |dq_i| max_j |k^_j|
//
// so a key whose quantised score is not above tau_lower - 2 eps_i (one eps for its score, one for the bound, which came
// from quantised scores too) cannot be in the support. Row blocks where eps lets too many keys through (channels with
// outliers), and heads with a NaN or infinite key, are scanned in float.
//
// A bound from what has been seen is low at first: three times as many scores are above it on their way as end in the
// support. So a sample of the keys, one in so many, is scanned before, and tau guessed from it, on the low side. A
// guess needs no proof in advance: a row is done with it if the tau of what it kept turns out to be above the guess by
// eps or more, as the tau of a part of the keys is never above tau. Where it is not, the row is scanned again, above
// that tau.
#pragma once

#include "cpu/scan.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

#if defined(ADASPLASH2_AVX512)
inline bool has_quantized_scan() { return __builtin_cpu_supports("avx512vnni") != 0; }
using QuantizedElement = int8_t;
constexpr uint32_t kKeyFlip = 0x80808080u;  // adds 128 to each: one factor of vpdpbusd is unsigned
#else
inline bool has_quantized_scan() { return kVectorBytes == 32; }
using QuantizedElement = int16_t;
constexpr uint32_t kKeyFlip = 0;
#endif
constexpr int64_t kPerWord = sizeof(uint32_t) / sizeof(QuantizedElement);  // what one lane multiplies and adds

// From so many keys on; below, re-scoring the candidates costs more than it saves.
constexpr int64_t kQuantizedKeys = 512;

// Rows whose 2 eps is above kSmallMargin (in z, whose window has the width 1) may have candidates, by the sample, up to
// this part of the keys that their block sees; with more it is scanned in float.
constexpr float kSmallMargin = 0.25f, kMostCandidates = 0.2f;

// The sample: every sample_stride()-th key, from the middle of the first stride on.
constexpr int64_t kSampleSize = 128, kLeastSampleStride = 8;
constexpr int64_t kLeastSampled = 32;  // keys of the sample that a row must see for a guess
constexpr float kGuessedMass = 2;  // sum of probabilities that a guess aims at, without the sample's best key: a tau
                                   // that is right to the left, but for one row in a hundred of Gaussian scores

// Of the margin 2 eps, what is kept below the tau of a whole list: a guess. eps bounds what rounding does to one score;
// tau is made of many, and in Gaussian data hardly ever off by a quarter of eps.
constexpr float kLikelyMargin = 0.625f;

constexpr int64_t kMostQuantizedDim = 512;

inline int64_t sample_stride(int64_t num_keys) { return std::max(kLeastSampleStride, num_keys / kSampleSize); }
inline int64_t num_sampled(int64_t num_keys, int64_t stride) { return (num_keys + stride / 2 - 1) / stride; }

// Keys as integers k^ / scale (of 8 bits: + 128), [panel][sub-tile][D / kPerWord][kTileCols][kPerWord], with one scale
// a kv head.
struct QuantizedKeys {
  Buffer<uint32_t> data;              // kPerWord integers each
  Buffer<float> residual_norm, norm;  // per panel: the largest of its rows
  int64_t panels_per_head = 0, panel_size = 0;

  void reserve(const AttentionProblem& problem, int64_t num_keys) {
    panels_per_head = panels_of(num_keys);
    panel_size = problem.head_dim / kPerWord * kPanelCols;
    const int64_t num_panels = problem.batch * problem.num_kv_heads * panels_per_head;
    data.reserve(num_panels * panel_size);
    residual_norm.reserve(num_panels);
    norm.reserve(num_panels);
  }
};

// The quantised queries of a row block, groups [group][D / kPerWord][kTileRows] of kPerWord signed integers.
struct QuantizedQueries {
  Buffer<uint32_t> data;
  float key_scale;  // of the keys that they meet
  alignas(64) float scale[kRowBlock];
  alignas(64) float epsilon[kRowBlock];
  alignas(64) int32_t offset[kRowBlock];  // what kKeyFlip adds to each product
};

struct QuantizedRow {
  float norm, residual_norm, quantized_norm;
  int32_t offset;
};

// What turns a row's integer sums into hits and scores.
struct QuantizedThresholds {
  // A sum starts at start[row]; it ends >= 0 where the score is above the row's lower bound, and then is listed as it
  // is: score = factor * (sum + base).
  int32_t start[kRowBlock], base[kRowBlock];
  float factor[kRowBlock];

  void set(int64_t row, float lower, const QuantizedQueries& queries) {
    constexpr float kMost = 1 << 30;  // sums stay below it, so nothing overflows
    factor[row] = queries.scale[row] * queries.key_scale;
    base[row] = static_cast<int32_t>(std::floor(std::clamp(lower / factor[row], -kMost, kMost))) + 1;
    start[row] = -(base[row] + queries.offset[row]);
  }

  // Sums -> scores, of the entries that a row's list has got since the last call; before set() has other numbers.
  void convert_sums(RowLists<float>& lists, int64_t row) const {
    typedef int32_t Sums __attribute__((vector_size(kVectorBytes)));
    float* score = lists.score[row];
    const int32_t size = lists.size[row];
    Vector<float> largest = broadcast(lists.score_max[row]);
    for (int32_t j = lists.checked[row]; j < size; j += kLanes<float>) {
      Sums sums;
      std::memcpy(&sums, score + j, sizeof(sums));
      store(score + j, __builtin_convertvector(sums + base[row], Vector<float>) * factor[row]);
      if (j + kLanes<float> > size) pad(score, size);
      largest = max<float>(largest, load(score + j));
    }
    lists.score_max[row] = reduce_max<float>(largest);
    lists.checked[row] = size;
  }
};

// Of a panel. In memory, where an instruction of AVX-512 broadcasts them as it uses them; from a register that would
// take one of its own, and no register for vectors is free.
struct PanelConstants {
  int32_t first_key, half = kPanelCols / 2;
};

#if defined(ADASPLASH2_AVX512)

// So that no element of the row is above 127 scales.
template <class Element>
float least_scale(const Element* row, int64_t dim, float factor) {
  Vector<float> largest = {};
  for (int64_t d = 0; d < dim; d += 16)
    largest = max<float>(largest, (Vector<float>)_mm512_abs_ps((__m512)(load(row + d) * factor)));
  return std::max(reduce_max<float>(largest) / 127, std::numeric_limits<float>::min());
}

// Rounds a row to multiples of `scale`.
template <class Element>
QuantizedRow quantize_row(const Element* row, int64_t dim, float factor, float scale, int8_t* quantized) {
  const float inverse = 1 / scale;
  Vector<float> norm = {}, residual_norm = {}, quantized_norm = {};
  __m512i sum = _mm512_setzero_si512();
  for (int64_t d = 0; d < dim; d += 16) {
    const Vector<float> x = load(row + d) * factor;
    const __m512i rounded = _mm512_cvtps_epi32((__m512)(x * inverse));
    const __m128i bytes = _mm512_cvtsepi32_epi8(rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quantized + d), bytes);
    const __m512i kept = _mm512_cvtepi8_epi32(bytes);
    const Vector<float> value = (Vector<float>)_mm512_cvtepi32_ps(kept) * scale, residual = x - value;
    sum = _mm512_add_epi32(sum, kept);
    norm += x * x;
    residual_norm += residual * residual;
    quantized_norm += value * value;
  }
  return {std::sqrt(reduce_add<float>(norm)), std::sqrt(reduce_add<float>(residual_norm)),
          std::sqrt(reduce_add<float>(quantized_norm)), 128 * _mm512_reduce_add_epi32(sum)};
}

const bool kHasByteCompress = __builtin_cpu_supports("avx512vbmi2") != 0;  // Ice Lake, Zen 4 and newer

// The numbers of the bits that are set, a byte each, then zeros.
ADASPLASH2_INLINE __m512i numbers_of_bits(uint64_t bits) {
  alignas(64) static constexpr uint8_t kLane[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                                    32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                                    48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  __m512i numbers;
  if (__builtin_expect(!kHasByteCompress, 0)) {
    alignas(64) uint8_t bytes[64] = {};
    for (int count = 0; bits != 0; bits &= bits - 1) bytes[count++] = static_cast<uint8_t>(__builtin_ctzll(bits));
    return _mm512_load_si512(bytes);
  }
  asm("vpcompressb %1, %0%{%2%}%{z%}" : "=v"(numbers) : "v"(_mm512_load_si512(kLane)), "Yk"(_cvtu64_mask64(bits)));
  return numbers;
}

// Writes the sums with the named numbers, of 64 in four vectors, and their columns.
ADASPLASH2_INLINE void append_sums(float* sums, int32_t* column, const __m512i (&acc)[4], __m128i numbers,
                                   const PanelConstants& constants) {
  const __m512i index = _mm512_cvtepu8_epi32(numbers);
  const __m512i low = _mm512_permutex2var_epi32(acc[0], index, acc[1]);
  const __m512i high = _mm512_permutex2var_epi32(acc[2], index, acc[3]);
  const __mmask16 is_high = _mm512_test_epi32_mask(index, _mm512_set1_epi32(constants.half));
  _mm512_storeu_si512(sums, _mm512_mask_mov_epi32(low, is_high, high));
  _mm512_storeu_si512(column, _mm512_add_epi32(index, _mm512_set1_epi32(constants.first_key)));
}

template <bool kEdited>
__attribute__((noinline)) void scan_group_quantized(const uint32_t* group, const uint32_t* panel, int64_t depth,
                                                    const PanelConstants& constants, int64_t first_row,
                                                    const QuantizedThresholds& thresholds, const uint64_t* allowed,
                                                    RowLists<float>& lists) {
  __m512i acc[kTileRows][4];
#pragma GCC unroll 6
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[row][v] = _mm512_set1_epi32(thresholds.start[first_row + row]);
  }
  for (int64_t d = 0; d < depth; ++d) {
    __m512i key[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) key[v] = _mm512_load_si512(panel + d * kPanelCols + v * 16);
#pragma GCC unroll 6
    for (int row = 0; row < kTileRows; ++row) {
      const __m512i query = _mm512_set1_epi32(static_cast<int32_t>(group[d * kTileRows + row]));
#pragma GCC unroll 4
      // Not the intrinsic: GCC 12 spills the accumulators around it. (Unsigned keys, signed queries.)
      for (int v = 0; v < 4; ++v) asm("vpdpbusd %2, %1, %0" : "+v"(acc[row][v]) : "v"(key[v]), "v"(query));
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kTileRows; ++row) {
    uint64_t hits = 0;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      hits |= uint64_t{_mm512_cmpge_epi32_mask(acc[row][v], _mm512_setzero_si512())} << (16 * v);
    if constexpr (kEdited) hits &= allowed[row];
    // No branch on whether there are any: nothing foretells it.
    const int32_t size = lists.size[first_row + row], count = __builtin_popcountll(hits);
    lists.size[first_row + row] = size + count;
    float* sums = lists.score[first_row + row] + size;
    int32_t* column = lists.column[first_row + row] + size;
    const __m512i numbers = numbers_of_bits(hits);
    append_sums(sums, column, acc[row], _mm512_castsi512_si128(numbers), constants);
    if (__builtin_expect(count <= 16, 1)) continue;
    append_sums(sums + 16, column + 16, acc[row], _mm512_extracti32x4_epi32(numbers, 1), constants);
    append_sums(sums + 32, column + 32, acc[row], _mm512_extracti32x4_epi32(numbers, 2), constants);
    append_sums(sums + 48, column + 48, acc[row], _mm512_extracti32x4_epi32(numbers, 3), constants);
  }
}

#elif defined(ADASPLASH2_AVX2)

// So that the norm of the row is not above so many scales. Then no element overflows, and of two such rows neither does
// any sum of products, by Cauchy and Schwarz: 2^30 is left of an int32_t for the thresholds.
constexpr float kMostNorm = 32000;
static_assert(kMostNorm + 16 < 32767.f && (kMostNorm + 16) * (kMostNorm + 16) < 1 << 30,
              "16: what rounding adds to the norm of 512 elements is below sqrt(512) / 2");

template <class Element>
float least_scale(const Element* row, int64_t dim, float factor) {
  constexpr float kLeastNorm = 1e-15f;  // its square is far above underflow
  Vector<float> norm = {};
  for (int64_t d = 0; d < dim; d += kLanes<float>) {
    const Vector<float> x = load(row + d) * factor;
    norm += x * x;
  }
  return max_or_nan(kLeastNorm, std::sqrt(reduce_add<float>(norm))) / kMostNorm;
}

// Rounds a row to multiples of `scale`. What it returns are bounds that follow from the scale; a NaN there is one here.
template <class Element>
QuantizedRow quantize_row(const Element* row, int64_t dim, float factor, float scale, int16_t* quantized) {
  const float inverse = 1 / scale;
  for (int64_t d = 0; d < dim; d += kLanes<float>) {
    const __m256i rounded = _mm256_cvtps_epi32((__m256)(load(row + d) * factor * inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quantized + d),
                     _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
  const float norm = kMostNorm * scale, residual_norm = 0.51f * scale * std::sqrt(static_cast<float>(dim));
  return {norm, residual_norm, norm + residual_norm, 0};
}

template <bool kEdited>
__attribute__((noinline)) void scan_group_quantized(const uint32_t* group, const uint32_t* panel, int64_t depth,
                                                    const PanelConstants& constants, int64_t first_row,
                                                    const QuantizedThresholds& thresholds, const uint64_t* allowed,
                                                    RowLists<float>& lists) {
  constexpr int kCols = kTileCols<float>;
  for (int sub = 0; sub < kPanelCols / kCols; ++sub) {
    const uint32_t* tile = panel + sub * depth * kCols;
    __m256i acc[kTileRows][2];
#pragma GCC unroll 6
    for (int row = 0; row < kTileRows; ++row)
      acc[row][0] = acc[row][1] = _mm256_set1_epi32(thresholds.start[first_row + row]);
    for (int64_t d = 0; d < depth; ++d) {
      const __m256i key0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile + d * kCols));
      const __m256i key1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile + d * kCols + 8));
#pragma GCC unroll 6
      for (int row = 0; row < kTileRows; ++row) {
        const __m256i query = _mm256_set1_epi32(static_cast<int32_t>(group[d * kTileRows + row]));
        acc[row][0] = _mm256_add_epi32(acc[row][0], _mm256_madd_epi16(query, key0));
        acc[row][1] = _mm256_add_epi32(acc[row][1], _mm256_madd_epi16(query, key1));
      }
    }
#pragma GCC unroll 6
    for (int row = 0; row < kTileRows; ++row) {
      const auto negative = [](__m256i x) { return static_cast<uint32_t>(_mm256_movemask_ps((__m256)x)); };
      if (negative(_mm256_and_si256(acc[row][0], acc[row][1])) == 0xff) continue;
      int32_t size = lists.size[first_row + row];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int first = sub * kCols + v * 8;
        uint32_t hits = negative(acc[row][v]) ^ 0xff;
        if constexpr (kEdited) hits &= static_cast<uint32_t>(allowed[row] >> first);
        size += append_compressed<float>(lists.score[first_row + row] + size, lists.column[first_row + row] + size,
                                         hits, (Vector<float>)acc[row][v], constants.first_key + first);
      }
      lists.size[first_row + row] = size;
    }
  }
}

#endif

#if defined(ADASPLASH2_AVX2)

template <class Element>
void quantize_panel(const Element* first_row, int64_t stride_row, int64_t count, int64_t dim, float scale,
                    int64_t index, QuantizedKeys& keys) {
  constexpr int64_t kCols = kTileCols<float>;
  uint32_t* out = keys.data.data() + index * keys.panel_size;
  float norm = 0, residual_norm = 0;
  alignas(64) QuantizedElement elements[kMostQuantizedDim];
  for (int64_t col = 0; col < kPanelCols; ++col) {
    std::fill_n(elements, dim, QuantizedElement{0});
    if (col < count) {
      const QuantizedRow row = quantize_row(first_row + col * stride_row, dim, 1.0f, scale, elements);
      norm = std::max(norm, row.quantized_norm);
      residual_norm = max_or_nan(residual_norm, row.residual_norm);
    }
    for (int64_t word = 0; word < dim / kPerWord; ++word) {
      uint32_t elements_of_word;
      std::memcpy(&elements_of_word, elements + word * kPerWord, sizeof(elements_of_word));
      out[(col / kCols * (dim / kPerWord) + word) * kCols + col % kCols] = elements_of_word ^ kKeyFlip;
    }
  }
  keys.norm[index] = norm;
  keys.residual_norm[index] = residual_norm;
}

// False if an error bound is not a number.
template <class Element>
bool quantize_queries(const HeadView<Element>& view, const RowBlock& block, float key_norm, float key_residual_norm,
                      QuantizedQueries& queries) {
  const int64_t dim = view.problem.head_dim;
  uint32_t* data = queries.data.reserve(kRowBlock * dim / kPerWord);
  alignas(64) QuantizedElement elements[kMostQuantizedDim];
  float total = 0;
  for (int64_t row = 0; row < block.num_groups() * kTileRows; ++row) {
    std::fill_n(elements, dim, QuantizedElement{0});
    queries.scale[row] = 1;
    queries.epsilon[row] = 0;
    queries.offset[row] = 0;
    if (row < block.num_rows) {
      const Element* query = view.query(block.first_row + row);
      queries.scale[row] = least_scale(query, dim, view.units.query_factor);
      const QuantizedRow quantized = quantize_row(query, dim, view.units.query_factor, queries.scale[row], elements);
      queries.offset[row] = quantized.offset;
      // The last term covers the rounding of these numbers and of both scores to float.
      queries.epsilon[row] = quantized.norm * key_residual_norm + quantized.residual_norm * key_norm +
                             1e-5f * (quantized.norm + quantized.residual_norm) * (key_norm + key_residual_norm);
      total += queries.epsilon[row];
    }
    for (int64_t word = 0; word < dim / kPerWord; ++word) {
      std::memcpy(data + (row / kTileRows * (dim / kPerWord) + word) * kTileRows + row % kTileRows,
                  elements + word * kPerWord, sizeof(uint32_t));
    }
  }
  return total < kInfinity<float>;
}

// Scans one panel for the named groups of the block's rows and prunes the lists that have grown.
template <class Element, Exponent kExponent>
void scan_panel_quantized(const HeadView<Element>& view, const RowBlock& block, GroupSet groups,
                          const QuantizedQueries& queries, const QuantizedKeys& keys, int64_t kv_index, int64_t panel,
                          const Power<float, kExponent>& power, QuantizedThresholds& thresholds,
                          RowLists<float>& lists) {
  const int64_t depth = view.problem.head_dim / kPerWord, index = kv_index * keys.panels_per_head + panel;
  const uint32_t* packed_panel = keys.data.data() + index * keys.panel_size;
  const PanelConstants constants{static_cast<int32_t>(panel * kPanelCols)};
  for (int64_t group = 0; group < block.num_groups(); ++group) {
    if (!groups.has(group)) continue;
    const uint32_t* rows = queries.data.data() + group * depth * kTileRows;
    const RowBlock::View seen = block.group_view(group, panel, /*has_mask=*/false);
    if (seen == RowBlock::View::kNothing) continue;
    if (seen == RowBlock::View::kEverything) {
      scan_group_quantized<false>(rows, packed_panel, depth, constants, group * kTileRows, thresholds, nullptr, lists);
    } else {
      uint64_t allowed[kTileRows];
      for (int row = 0; row < kTileRows; ++row)
        allowed[row] = allowed_keys(block.key_end[group * kTileRows + row] - constants.first_key);
      scan_group_quantized<true>(rows, packed_panel, depth, constants, group * kTileRows, thresholds, allowed, lists);
    }
    for (int64_t row = group * kTileRows; row < (group + 1) * kTileRows; ++row) {
      if (__builtin_expect(lists.size[row] < lists.limit[row], 1)) continue;
      thresholds.convert_sums(lists, row);
      prune(lists, row, power, view.units.unit);
      thresholds.set(row, lists.lower[row], queries);
    }
  }
}

#else

// Never called: has_quantized_scan() is false.
template <class Element>
void quantize_panel(const Element*, int64_t, int64_t, int64_t, float, int64_t, QuantizedKeys&) {}
template <class Element>
float least_scale(const Element*, int64_t, float) {
  return 0;
}
template <class Element>
bool quantize_queries(const HeadView<Element>&, const RowBlock&, float, float, QuantizedQueries&) {
  return false;
}
template <class Element, Exponent kExponent>
void scan_panel_quantized(const HeadView<Element>&, const RowBlock&, GroupSet, const QuantizedQueries&,
                          const QuantizedKeys&, int64_t, int64_t, const Power<float, kExponent>&, QuantizedThresholds&,
                          RowLists<float>&) {}

#endif

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
