// entmax of one long row, contiguous in memory, all lanes on it.
//
// Forward:
//   maxima    one pass over x: the row maximum, and the maximum of every 8 vectors, lane by lane
//   bound     those maxima are keys too, so their own tau is a lower bound on tau (docs/algorithm.md, section 1)
//   collect   x - row_max above the bound, to a short list; 8 vectors without such a key cost one comparison
//   solve     Newton on the norm over the list
//   write     prob; 8 vectors without a key of the support are zeros and x is not looked at again
// Backward: the weights and their sums, then the gradient; 8 vectors without a prob cost reading prob and writing
// zeros.
#pragma once

#include "cpu/entmax_common.h"
#include "cpu/tasks.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {
namespace entmax_slices {

template <class Real>
constexpr int64_t kGroup = int64_t{kGroupVectors} * kLanes<Real>;

// The vectors of a slice of at least one vector: vector v covers [v * lanes, ...), but the last one ends with the
// slice, so it may repeat lanes of the one before. Repeated keys must not count twice; written twice they do no harm,
// as long as their group is not skipped as dead.
template <class Real>
struct Cover {
  int64_t length;
  int64_t num_vectors;

  explicit Cover(int64_t n) : length(n), num_vectors((n + kLanes<Real> - 1) / kLanes<Real>) {}

  ADASPLASH2_INLINE int64_t start(int64_t v) const { return std::min(v * kLanes<Real>, length - kLanes<Real>); }
  ADASPLASH2_INLINE int repeated(int64_t v) const { return static_cast<int>(v * kLanes<Real> - start(v)); }
  ADASPLASH2_INLINE int64_t num_groups() const { return (num_vectors + kGroupVectors - 1) / kGroupVectors; }
  ADASPLASH2_INLINE bool is_whole(int64_t g) const { return (g + 1) * kGroup<Real> <= length; }
  // Calls function(first key, repeated lanes) for the vectors of group g, unrolled where the group is whole.
  template <class Function>
  ADASPLASH2_INLINE void for_group(int64_t g, Function function) const {
    const int64_t first = g * kGroupVectors;
    if (is_whole(g)) {
#pragma GCC unroll 8
      for (int i = 0; i < kGroupVectors; ++i) function((first + i) * kLanes<Real>, 0);
    } else {
      for (int64_t v = first; v < num_vectors; ++v) function(start(v), repeated(v));
    }
  }
};

// Lane numbers 0, 1, 2, ...
template <class Real>
ADASPLASH2_INLINE Bits<Real> lane_numbers() {
  Bits<Real> lanes;
  for (int lane = 0; lane < kLanes<Real>; ++lane) lanes[lane] = lane;
  return lanes;
}

// v with its first `count` lanes replaced.
template <class Real>
ADASPLASH2_INLINE Vector<Real> replace_first(Vector<Real> v, int count, Real by) {
  if (count == 0) return v;
  return lane_numbers<Real>() >= count ? v : broadcast(by);
}

// Writes the lanes of v that are set in `mask` to the front of list[], may write a whole vector, returns how many.
template <class Real>
ADASPLASH2_INLINE int append(Real* list, uint32_t mask, Vector<Real> v) {
#if defined(ADASPLASH2_AVX512)
  if constexpr (std::is_same_v<Real, float>) {
    _mm512_storeu_ps(list, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)v));
  } else {
    _mm512_storeu_pd(list, _mm512_maskz_compress_pd(static_cast<__mmask8>(mask), (__m512d)v));
  }
  return __builtin_popcount(mask);
#else
  if (mask == (1u << kLanes<Real>)-1) {
    store(list, v);
    return kLanes<Real>;
  }
  Real lanes[kLanes<Real>];
  std::memcpy(lanes, &v, sizeof(v));
  int count = 0;
  for (; mask != 0; mask &= mask - 1) list[count++] = lanes[__builtin_ctz(mask)];
  return count;
#endif
}

// ---- tau of a list --------------------------------------------------------------------------------------------------

struct WideSums {
  double prob = 0.0;
  double weight = 0.0;
};

// sum gap^b and sum gap^(b - 1) at gap = unit * (score - t), over a list whose length is a multiple of two vectors.
template <class Real, Exponent kExponent>
WideSums sums_at(const Power<Real, kExponent>& power, const Real* score, int64_t size, Real t, Real unit) {
  const Vector<Real> threshold = broadcast(t), zero = {};
  WideSums sums;
  for (int64_t begin = 0; begin < size; begin += kFlushVectors * kLanes<Real>) {
    const int64_t end = std::min(size, begin + kFlushVectors * kLanes<Real>);
    Vector<Real> prob[2] = {}, weight[2] = {};
    for (int64_t j = begin; j < end; j += 2 * kLanes<Real>) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Vector<Real> difference = max<Real>(load(score + j + i * kLanes<Real>) - threshold, zero);
        if constexpr (kExponent == Exponent::kGeneral) {
          if (!any_above<Real>(difference, zero)) continue;
        }
        const Vector<Real> gap = difference * unit, w = power.weight(gap);
        prob[i] += w * gap;
        weight[i] += w;
      }
    }
    sums.prob += reduce_add<Real>(prob[0] + prob[1]);
    sums.weight += reduce_add<Real>(weight[0] + weight[1]);
  }
  return sums;
}

template <class Real>
struct Root {
  Real lower;  // a bound: at most tau but for the rounding of the sums
  double tau;  // lower and one more step
};

// Climbs from t <= tau by Newton on the norm until sum prob - 1 <= tolerance; everything in units of the scores.
template <class Real, Exponent kExponent>
Root<Real> climb(const Power<Real, kExponent>& power, const Real* score, int64_t size, Real t, Real unit, double alpha,
                 double tolerance) {
  double next = t;
  for (int step = 0; step < kMostSteps; ++step) {
    const WideSums sums = sums_at(power, score, size, t, unit);
    const double norm = kExponent == Exponent::kSquare   ? std::sqrt(sums.prob)
                        : kExponent == Exponent::kLinear ? 1.0
                                                         : std::pow(sums.prob, 2.0 - alpha);
    next = t + (sums.prob - norm) / (sums.weight * static_cast<double>(unit));
    const Real rounded = round_down<Real>(next);
    if (sums.prob - 1.0 <= tolerance || !(rounded > t)) break;
    t = rounded;
  }
  return {t, next};
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class Element>
void fill(Element* out, int64_t n, Accumulator<Element> value) {
  using Real = Accumulator<Element>;
  Element values[kLanes<Real>];
  store(values, broadcast(value));
  int64_t j = 0;
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) std::memcpy(out + j, values, sizeof(values));
  std::memcpy(out + j, values, (n - j) * sizeof(Element));
}

template <class Element>
class ForwardRow {
  using Real = Accumulator<Element>;
  static constexpr int kLane = kLanes<Real>;

 public:
  explicit ForwardRow(int64_t length)
      : group_max_((Cover<Real>(length).num_groups() + 1) * kLane), list_(round_up(length, kLane) + 3 * kLane) {}

  void run(const Element* x, Element* prob, int64_t length, double alpha) {
    const Real row_max = find_maxima(x, length);
    if (row_max == -kInfinity<Real>) return fill<Element>(prob, length, 0);
    if (!(row_max < kInfinity<Real>)) return fill<Element>(prob, length, std::numeric_limits<Real>::quiet_NaN());
    with_power(alpha, [&](auto exponent) { solve_and_write<exponent>(x, prob, length, row_max, alpha); });
  }

 private:
  // Fills group_max_; returns the maximum, NaN if there is a NaN.
  Real find_maxima(const Element* x, int64_t length) {
    const Cover<Real> cover(length);
    Vector<Real> row_max = broadcast(-kInfinity<Real>), row_sum = {};
    for (int64_t g = 0; g < cover.num_groups(); ++g) {
      Vector<Real> group_max = broadcast(-kInfinity<Real>), group_sum = {};
      cover.for_group(g, [&](int64_t j, int repeated) {
        const Vector<Real> v = replace_first<Real>(load(x + j), repeated, -kInfinity<Real>);
        group_max = max<Real>(v, group_max);
        group_sum += v;
      });
      store(&group_max_[g * kLane], group_max);
      row_max = max<Real>(group_max, row_max);
      row_sum += group_sum;
    }
    store(&group_max_[cover.num_groups() * kLane], broadcast(-kInfinity<Real>));  // lists come in pairs of vectors
    // The maximum ignores NaN, the sum does not. It is NaN also after +inf and -inf, or an overflow: then look closer.
    const Real sum = reduce_add<Real>(row_sum);
    if (sum != sum) {
      for (int64_t v = 0; v < cover.num_vectors; ++v) {
        const Vector<Real> values = load(x + cover.start(v));
        if (above<Real>(values, broadcast(kInfinity<Real>)) != 0) return std::numeric_limits<Real>::quiet_NaN();
      }
    }
    return reduce_max<Real>(row_max);
  }

  template <Exponent kExponent>
  void solve_and_write(const Element* x, Element* prob, int64_t length, Real row_max, double alpha) {
    const Power<Real, kExponent> power(alpha);
    const Real unit = static_cast<Real>(alpha - 1.0);
    const Root<Real> root = solve(power, x, length, row_max, unit, alpha);
    // gap = unit * (x - (row_max + tau)): the threshold as a Real and what its rounding left over, so that a small gap
    // is exact to a few roundings of its own size.
    const double tau = static_cast<double>(row_max) + root.tau;
    const Real threshold = static_cast<Real>(tau);
    const Real left_over = static_cast<Real>((alpha - 1.0) * ((static_cast<double>(threshold) - row_max) - root.tau));
    write(power, x, prob, length, threshold, left_over, unit, root.lower);
  }

  // tau of a slice in units of x, relative to row_max.
  template <Exponent kExponent>
  Root<Real> solve(const Power<Real, kExponent>& power, const Element* x, int64_t length, Real row_max, Real unit,
                   double alpha) {
    const Cover<Real> cover(length);
    const Vector<Real> largest = broadcast(row_max);
    const int64_t num_groups = cover.num_groups();
    for (int64_t g = 0; g < num_groups; ++g) store(&group_max_[g * kLane], load(&group_max_[g * kLane]) - largest);
    Real lower = round_down<Real>(-1.0 / (alpha - 1.0));
    if (num_groups > 1) {
      lower =
          climb(power, group_max_.data(), round_up(num_groups, 2) * kLane, lower, unit, alpha, kRoughTolerance).lower;
    }
    const int64_t size = collect(x, cover, largest, lower);
    return climb(power, list_.data(), size, lower, unit, alpha, final_tolerance<Real, kExponent>());
  }

  // list_ = x - row_max where above `lower`, padded to a multiple of two vectors; returns its length.
  int64_t collect(const Element* x, const Cover<Real>& cover, Vector<Real> row_max, Real lower) {
    const Vector<Real> threshold = broadcast(lower);
    Real* end = list_.data();
    for (int64_t g = 0; g < cover.num_groups(); ++g) {
      if (!any_above<Real>(load(&group_max_[g * kLane]), threshold)) continue;
      cover.for_group(g, [&](int64_t j, int repeated) {
        const Vector<Real> shifted = load(x + j) - row_max;
        end += append<Real>(end, above<Real>(shifted, threshold) >> repeated << repeated, shifted);
      });
    }
    for (int i = 0; i < 2; ++i) store(end + i * kLane, broadcast(-kInfinity<Real>));
    return round_up(end - list_.data(), 2 * kLane);
  }

  template <Exponent kExponent>
  void write(const Power<Real, kExponent>& power, const Element* x, Element* prob, int64_t length, Real threshold,
             Real left_over, Real unit, Real lower) {
    const Cover<Real> cover(length);
    const Vector<Real> zero = {};
    for (int64_t g = 0; g < cover.num_groups(); ++g) {
      if (cover.is_whole(g) && !any_above<Real>(load(&group_max_[g * kLane]), broadcast(lower))) {
        cover.for_group(g, [&](int64_t j, int) { store(prob + j, zero); });
        continue;
      }
      cover.for_group(
          g, [&](int64_t j, int) { store(prob + j, prob_of(power, (load(x + j) - threshold) * unit + left_over)); });
    }
  }

  Buffer<Real> group_max_;  // (num_groups, lanes), minus row_max once that is known
  Buffer<Real> list_;
};

// ---- backward -------------------------------------------------------------------------------------------------------

template <class Element>
ADASPLASH2_INLINE bool any_nonzero(const Element* p, int64_t count) {
  typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
  const char* bytes = reinterpret_cast<const char*>(p);
  Words seen = {};
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(Element)); i += kVectorBytes) {
    Words words;
    std::memcpy(&words, bytes + i, sizeof(words));
    seen |= words;
  }
  uint64_t any = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) any |= seen[i];
  return any != 0;
}

template <class Element>
class BackwardRow {
  using Real = Accumulator<Element>;
  static constexpr int kLane = kLanes<Real>;

 public:
  explicit BackwardRow(int64_t length) : weight_(length), is_live_(Cover<Real>(length).num_groups()) {}

  // grad_x and grad_alpha are nullable.
  void run(const Element* prob, const Element* grad_prob, Element* grad_x, double* grad_alpha, int64_t length,
           double alpha) {
    const Real first = load_one(prob);
    if (first != first) {  // a slice of NaN
      if (grad_x != nullptr) fill<Element>(grad_x, length, first);
      if (grad_alpha != nullptr) *grad_alpha = first;
      return;
    }
    RowSums sums;
    with_power(alpha, [&](auto exponent) {
      if (grad_alpha != nullptr) add_up<exponent, true>(sums, prob, grad_prob, length, alpha);
      else add_up<exponent, false>(sums, prob, grad_prob, length, alpha);
    });
    const double delta = sums.weight > 0.0 ? sums.weight_grad / sums.weight : 0.0;
    if (grad_x != nullptr) write(grad_prob, grad_x, length, static_cast<Real>(delta));
    if (grad_alpha != nullptr) {
      *grad_alpha = alpha_gradient(sums.prob_grad, delta, sums.entropy_grad, sums.entropy, alpha);
    }
  }

 private:
  struct RowSums {
    double weight = 0.0, weight_grad = 0.0;                     // w, w dP
    double prob_grad = 0.0, entropy = 0.0, entropy_grad = 0.0;  // p dP, h = -p log p, h dP
  };

  // weight_ and is_live_ of the slice, and its sums.
  template <Exponent kExponent, bool kWantAlpha>
  void add_up(RowSums& sums, const Element* prob, const Element* grad_prob, int64_t length, double alpha) {
    const Cover<Real> cover(length);
    const Real exponent = static_cast<Real>(2.0 - alpha);
    const Vector<Real> zero = {};
    constexpr int64_t kFlushGroups = kFlushVectors / kGroupVectors;
    for (int64_t begin = 0; begin < cover.num_groups(); begin += kFlushGroups) {
      const int64_t end = std::min(cover.num_groups(), begin + kFlushGroups);
      Vector<Real> weight_sum = {}, weight_grad = {}, prob_grad = {}, entropy_sum = {}, entropy_grad = {};
      for (int64_t g = begin; g < end; ++g) {
        is_live_[g] = !cover.is_whole(g) || any_nonzero(prob + g * kGroup<Real>, kGroup<Real>);
        if (!is_live_[g]) continue;
        cover.for_group(g, [&](int64_t j, int repeated) {
          const Vector<Real> p = load(prob + j);
          Vector<Real> weight = weight_of<Real, kExponent>(p, exponent);
          store(&weight_[j], weight);
          const auto in_support = replace_first<Real>(p, repeated, 0) > zero;
          const Vector<Real> grad = in_support ? load(grad_prob + j) : zero;
          weight = in_support ? weight : zero;
          weight_sum += weight;
          weight_grad += weight * grad;
          if constexpr (kWantAlpha) {
            const Vector<Real> entropy = in_support ? p * log2_positive<Real>(p) * -kLn2<Real> : zero;
            prob_grad += p * grad;
            entropy_sum += entropy;
            entropy_grad += entropy * grad;
          }
        });
      }
      sums.weight += reduce_add<Real>(weight_sum);
      sums.weight_grad += reduce_add<Real>(weight_grad);
      if constexpr (kWantAlpha) {
        sums.prob_grad += reduce_add<Real>(prob_grad);
        sums.entropy += reduce_add<Real>(entropy_sum);
        sums.entropy_grad += reduce_add<Real>(entropy_grad);
      }
    }
  }

  void write(const Element* grad_prob, Element* grad_x, int64_t length, Real delta) {
    const Cover<Real> cover(length);
    const Vector<Real> zero = {};
    for (int64_t g = 0; g < cover.num_groups(); ++g) {
      if (!is_live_[g]) {
        cover.for_group(g, [&](int64_t j, int) { store(grad_x + j, zero); });
        continue;
      }
      cover.for_group(g, [&](int64_t j, int) {
        const Vector<Real> weight = load(&weight_[j]);
        store(grad_x + j, weight > zero ? weight * (load(grad_prob + j) - delta) : zero);
      });
    }
  }

  Buffer<Real> weight_;      // (length,), where is_live_
  Buffer<uint8_t> is_live_;  // (num_groups,): the group has a prob that is not zero
};

}  // namespace entmax_slices
}  // namespace adasplash2::cpu::ADASPLASH2_ISA
