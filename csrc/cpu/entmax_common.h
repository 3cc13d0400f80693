// What the two ways of running entmax over slices share: the maths of a vector of keys, and constants.
#pragma once

#include "cpu/entmax_math.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {
namespace entmax_slices {

constexpr int kGroupVectors = 8;  // vectors that share one maximum: the grain of what is skipped

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class Real>
ADASPLASH2_INLINE bool any_above(Vector<Real> a, Vector<Real> b) {
  return above<Real>(a, b) != 0;
}

// Sums are added up this many vectors at a time, and their totals with care: right to a few roundings at any length.
constexpr int64_t kFlushVectors = 64;

constexpr int kMostSteps = 100;          // about 5 are usual; the bound only guards against what nobody thought of
constexpr double kRoughTolerance = 0.1;  // for a bound that will be improved on

// The largest Real that is at most x.
template <class Real>
ADASPLASH2_INLINE Real round_down(double x) {
  const Real rounded = static_cast<Real>(x);
  return static_cast<double>(rounded) > x ? std::nextafter(rounded, -kInfinity<Real>) : rounded;
}

// f^(1 - 1/b), f = sum gap^b, which Newton on the norm takes from f; 1 - 1/b = 2 - alpha.
template <class Real, Exponent kExponent>
ADASPLASH2_INLINE Vector<Real> norm_of(Vector<Real> prob_sum, Real unit) {
  if constexpr (kExponent == Exponent::kSquare) return square_root<Real>(prob_sum);
  else if constexpr (kExponent == Exponent::kLinear) return broadcast(Real(1));
  else return power<Real>(prob_sum, 1 - unit);
}

template <class Real, Exponent kExponent>
ADASPLASH2_INLINE Vector<Real> prob_of(const Power<Real, kExponent>& power, Vector<Real> gap) {
  const Vector<Real> zero = {}, one = broadcast(Real(1));
  gap = max<Real>(gap, zero);
  if constexpr (kExponent != Exponent::kGeneral) return power.prob(gap);
  if (!any_above<Real>(gap, zero)) return zero;
  return power.prob(gap < one ? gap : one);  // a gap of 1 + epsilon must not be raised to a high power
}

// w = prob^(2 - alpha) on the support, 0 elsewhere.
template <class Real, Exponent kExponent>
ADASPLASH2_INLINE Vector<Real> weight_of(Vector<Real> prob, Real exponent) {
  if constexpr (kExponent == Exponent::kSquare) return square_root<Real>(prob);
  else if constexpr (kExponent == Exponent::kLinear) return prob > Real(0) ? broadcast(Real(1)) : broadcast(Real(0));
  else return power<Real>(prob, exponent);
}

// What is left of sum prob - 1 before the last step. That step squares it for alpha <= 1.5, where the sum is smooth;
// for larger alpha keys that leave the support on the way bend it, and only as little as they weigh.
template <class Real, Exponent kExponent>
constexpr double final_tolerance() {
  constexpr double epsilon = std::numeric_limits<Real>::epsilon();
  if constexpr (kExponent == Exponent::kSquare) return std::is_same_v<Real, double> ? 1e-9 : 3e-5;
  else return 8.0 * epsilon;
}

template <class Real>
constexpr Real kLn2 = static_cast<Real>(0.69314718055994530942);

// <dP, dprob / dalpha> from sum p dP, delta, sum h dP and sum h, h = -p log p (docs/algorithm.md).
inline double alpha_gradient(double prob_grad, double delta, double entropy_grad, double entropy, double alpha) {
  const double unit = alpha - 1.0;
  return (prob_grad - delta) / (unit * unit) + (entropy_grad - delta * entropy) / unit;
}

}  // namespace entmax_slices
}  // namespace adasplash2::cpu::ADASPLASH2_ISA
