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
};

template <class Real, Exponent kExponent>
ADASPLASH2_INLINE Sums<Real> list_sums(const Power<Real, kExponent>& power, const Real* score, int64_t size, Real t,
                                       Real unit) {
  Vector<Real> prob_sum = {}, weight_sum = {};
  const Vector<Real> threshold = broadcast(t), zero = {};
  for (int64_t j = 0; j < size; j += kLanes<Real>) {
    const Vector<Real> gap = max<Real>((load(score + j) - threshold) * unit, zero);
    const Vector<Real> weight = power.weight(gap);
    weight_sum += weight;
    prob_sum += weight * gap;
  }
  return {reduce_add<Real>(prob_sum), reduce_add<Real>(weight_sum)};
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

// tau of a list of finite scores, in the list's units, from a lower bound t <= tau.
//
// Newton on the norm climbs towards tau from the left and converges quadratically; for alpha = 2 it ends on it, as the
// sum is piecewise linear. For alpha = 1.5 the last step is the exact root of sum gap^2 = 1 over the keys now in the
// support. That step is the polish only, never a bound: it is right when no key leaves.
template <class Real, Exponent kExponent>
ADASPLASH2_INLINE Real list_tau(const Power<Real, kExponent>& power, const Real* score, int64_t size, Real t,
                                Real unit) {
  constexpr int kMostSteps = 100;  // about 5 to 10 are usual; the bound only guards against rounding cycles
  const Real tolerance =
      (kExponent == Exponent::kSquare ? Real(1e-3) : 4 * std::numeric_limits<Real>::epsilon()) / unit;
  for (int step = 0; step < kMostSteps; ++step) {
    const Sums<Real> sums = list_sums(power, score, size, t, unit);
    if (!(sums.prob > 1) || !(sums.weight > 0)) break;
    const Real increase = power.norm_step(sums.prob, sums.weight) / unit;
    t += increase;
    if (!(increase > tolerance)) break;
  }
  if constexpr (kExponent == Exponent::kSquare) {
    for (int polish = 0; polish < 2; ++polish) {
      const Sums<Real> sums = list_sums(power, score, size, t, unit);
      const Real count = static_cast<Real>(list_count_above(score, size, t)), excess = sums.prob - 1;
      const Real discriminant = sums.weight * sums.weight - count * excess;
      if (count > 0 && discriminant > 0) t += excess / (sums.weight + std::sqrt(discriminant)) / unit;
    }
  }
  return t;
}

// How many keys of a list would stay in the support if the list were a sample, one in 1 / fraction, of all keys: those
// above the t with sum prob = fraction. `start` is a lower bound on tau of the list. Newton from the left, not converged:
// an estimate is all that is wanted.
template <class Real, Exponent kExponent>
ADASPLASH2_INLINE int64_t list_sampled_support(const Power<Real, kExponent>& power, const Real* score, int64_t size, Real start,
                                               Real unit, Real fraction) {
  constexpr int kSteps = 6;
  Real t = start;
  for (int step = 0; step < kSteps; ++step) {
    const Sums<Real> sums = list_sums(power, score, size, t, unit);
    if (!(sums.prob > fraction) || !(sums.weight > 0)) break;
    t += (sums.prob - fraction) / (power.b * sums.weight) / unit;
  }
  return list_count_above(score, size, t);
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
