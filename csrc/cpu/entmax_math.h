// The maths of one row on a list of scores: sums at a threshold, the bound on tau, tau itself.
//
// A list is an array `score` of `size` values that may be read up to the next whole vector; pad() fills that tail so
// that it never counts. `unit` converts differences of scores into z: gap = unit * (score - t). Symbols:
// docs/algorithm.md.
#pragma once

#include "cpu/simd.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

// prob = gap^b, weight = gap^(b - 1), b = 1 / (alpha - 1); alpha = 1.5 and 2 need no power function.
enum class Exponent { kSquare, kLinear, kGeneral };

template <class Real, Exponent kExponent>
struct Power {
  Real b;

  explicit Power(double alpha) : b(static_cast<Real>(1.0 / (alpha - 1.0))) {}

  ADASPLASH2_INLINE Vector<Real> weight(Vector<Real> gap) const {
    if constexpr (kExponent == Exponent::kSquare) return gap;
    else if constexpr (kExponent == Exponent::kLinear) return gap > Real(0) ? broadcast(Real(1)) : broadcast(Real(0));
    else return power<Real>(gap, b - 1);
  }

  ADASPLASH2_INLINE Vector<Real> prob(Vector<Real> gap) const {
    if constexpr (kExponent == Exponent::kSquare) return gap * gap;
    else if constexpr (kExponent == Exponent::kLinear) return gap;
    else return power<Real>(gap, b);
  }

  // Newton's step for the norm ||gap||_b = 1 in units of z: from the left of tau never past it, and never shorter than
  // Newton's step for sum gap^b = 1.
  ADASPLASH2_INLINE Real norm_step(Real prob_sum, Real weight_sum) const {
    if constexpr (kExponent == Exponent::kSquare) return (prob_sum - std::sqrt(prob_sum)) / weight_sum;
    else if constexpr (kExponent == Exponent::kLinear) return (prob_sum - 1) / weight_sum;
    else return (prob_sum - std::pow(prob_sum, 1 - 1 / b)) / weight_sum;
  }
};

template <class Function>
void with_power(double alpha, Function function) {
  if (alpha == 1.5) function(std::integral_constant<Exponent, Exponent::kSquare>());
  else if (alpha == 2.0) function(std::integral_constant<Exponent, Exponent::kLinear>());
  else function(std::integral_constant<Exponent, Exponent::kGeneral>());
}

template <class Real>
constexpr Real kLowest = std::numeric_limits<Real>::lowest();

template <class Real>
ADASPLASH2_INLINE void pad(Real* score, int64_t size) {
  store(score + size, broadcast(kLowest<Real>));
}

template <class Real>
struct MaxResult {
  Real max;
  bool is_finite;  // no score is NaN or infinite
};

template <class Real>
ADASPLASH2_INLINE MaxResult<Real> list_max(const Real* score, int64_t size) {
  Vector<Real> largest = broadcast(kLowest<Real>), zero = {};
  for (int64_t j = 0; j < size; j += kLanes<Real>) {
    const Vector<Real> x = load(score + j);
    largest = max<Real>(largest, x);
    zero += x * Real(0);  // NaN and inf turn this into NaN
  }
  const Real sum = reduce_add<Real>(zero);
  return {reduce_max<Real>(largest), sum == sum};
}

template <class Real>
struct Sums {
  Real prob;
  Real weight;
  Real count;  // of gaps above zero, where it is asked for
};

// Sums at gap = unit * ((score - origin) - t).
template <bool kCounts, class Real, Exponent kExponent>
ADASPLASH2_INLINE Sums<Real> list_sums(const Power<Real, kExponent>& power, const Real* score, int64_t size,
                                       Real origin, Real t, Real unit) {
  Vector<Real> prob_sum = {}, weight_sum = {}, count = {};
  const Vector<Real> zero = {}, one = broadcast(Real(1));
  for (int64_t j = 0; j < size; j += kLanes<Real>) {
    const Vector<Real> gap = max<Real>(((load(score + j) - origin) - t) * unit, zero);
    const Vector<Real> weight = power.weight(gap);
    weight_sum += weight;
    prob_sum += weight * gap;
    if constexpr (kCounts) count += gap > zero ? one : zero;
  }
  return {reduce_add<Real>(prob_sum), reduce_add<Real>(weight_sum), kCounts ? reduce_add<Real>(count) : Real(0)};
}

template <class Real>
ADASPLASH2_INLINE int64_t list_count_above(const Real* score, int64_t size, Real t) {
  int64_t count = 0;
  const Vector<Real> threshold = broadcast(t);
  for (int64_t j = 0; j < size; j += kLanes<Real>) count += __builtin_popcount(above<Real>(load(score + j), threshold));
  return count;
}

template <class Real>
ADASPLASH2_INLINE int64_t list_keep_above(Real* score, int32_t* column, int64_t size, Real t) {
  int64_t kept = 0;
  const Vector<Real> threshold = broadcast(t);
  for (int64_t j = 0; j < size; j += kLanes<Real>) {
    const Vector<Real> x = load(score + j);
    kept += keep_compressed<Real>(score + kept, column + kept, above<Real>(x, threshold), x, column + j);
  }
  return kept;
}

// tau - score_max of a list of finite scores, in the list's units; score_max is the list's maximum, `start` any number
// (the closer the better). Relative to the maximum, tau has all its digits however large the scores are.
//
// From the left of tau: Newton on the norm, which never passes it; within reach of it for alpha = 1.5, the exact root
// of sum gap^2 = 1 over the keys above t. From the right: that root too, or Newton on the sum, which is convex, and
// lands on the left. Steps end when one is so short that what it leaves is below rounding: for alpha = 1.5 that is
// second order in the step (only keys that it crosses count), for alpha = 2 the sum is piecewise linear and the step
// itself ends it.
template <class Real, Exponent kExponent>
ADASPLASH2_INLINE Real list_tau(const Power<Real, kExponent>& power, const Real* score, int64_t size, Real score_max,
                                Real start, Real unit) {
  constexpr int kMostSteps = 100;  // 3 to 6 are usual; the bound only guards against cycles by rounding
  constexpr Real kEpsilon = std::numeric_limits<Real>::epsilon();
  const Real tolerance = (kExponent == Exponent::kSquare ? std::sqrt(kEpsilon) / 8 : 4 * kEpsilon) / unit;
  Real t = start;
  for (int step = 0; step < kMostSteps; ++step) {
    const Sums<Real> sums = list_sums<kExponent == Exponent::kSquare>(power, score, size, score_max, t, unit);
    const Real excess = sums.prob - 1;
    if (!(sums.weight > 0)) {  // right of every score
      t = -1 / unit;
      continue;
    }
    Real increase = 0;
    if constexpr (kExponent == Exponent::kSquare) {
      const Real discriminant = sums.weight * sums.weight - sums.count * excess;
      increase = sums.prob < 2 && discriminant > 0 ? excess / (sums.weight + std::sqrt(discriminant))
                                                   : power.norm_step(sums.prob, sums.weight);
    } else {
      increase = excess > 0 ? power.norm_step(sums.prob, sums.weight) : excess / (power.b * sums.weight);
    }
    increase /= unit;
    t += increase;
    if (std::fabs(increase) <= tolerance) break;
  }
  return t;
}

// How many keys of a list would stay in the support if the list were a sample, one in 1 / fraction, of all keys, and
// where their tau - score_max would be: the t with sum prob = fraction. Newton from `start`, a lower bound on tau of
// the list; not converged: an estimate is all that is wanted.
template <class Real, Exponent kExponent>
ADASPLASH2_INLINE Real list_sampled_tau(const Power<Real, kExponent>& power, const Real* score, int64_t size,
                                        Real score_max, Real start, Real unit, Real fraction) {
  constexpr int kSteps = 6;
  Real t = start;
  for (int step = 0; step < kSteps; ++step) {
    const Sums<Real> sums = list_sums<false>(power, score, size, score_max, t, unit);
    if (!(sums.prob > fraction) || !(sums.weight > 0)) break;
    t += (sums.prob - fraction) / (power.b * sums.weight) / unit;
  }
  return t;
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
