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

// The same, of scores whose -inf, which takes no part, becomes the lowest number; NaN stays.
template <class Real>
ADASPLASH2_INLINE MaxResult<Real> list_raise_and_max(Real* score, int64_t size) {
  const Vector<Real> lowest = broadcast(kLowest<Real>);
  Vector<Real> largest = lowest, zero = {};
  for (int64_t j = 0; j < size; j += kLanes<Real>) {
    const Vector<Real> x = load(score + j), raised = x < lowest ? lowest : x;
    store(score + j, raised);
    largest = max<Real>(largest, raised);
    zero += raised * Real(0);
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
  struct Partial {
    Vector<Real> prob = {}, weight = {}, count = {};
  } even, odd;  // two chains of additions, whose latency would show
  const Vector<Real> zero = {}, one = broadcast(Real(1));
  const auto add = [&](Partial& sums, int64_t j) {
    const Vector<Real> gap = max<Real>(((load(score + j) - origin) - t) * unit, zero);
    const Vector<Real> weight = power.weight(gap);
    sums.weight += weight;
    sums.prob += weight * gap;
    if constexpr (kCounts) sums.count += gap > zero ? one : zero;
  };
  int64_t j = 0;
  for (; j + kLanes<Real> < size; j += 2 * kLanes<Real>) {
    add(even, j);
    add(odd, j + kLanes<Real>);
  }
  if (j < size) add(even, j);
  return {reduce_add<Real>(even.prob + odd.prob), reduce_add<Real>(even.weight + odd.weight),
          kCounts ? reduce_add<Real>(even.count + odd.count) : Real(0)};
}

// How far a step of Newton from the sums at t over n scores can be off by rounding: the sums are right to
// (n / lanes + 8) ulp, t itself to one.
template <class Real>
ADASPLASH2_INLINE Real tau_rounding(int64_t size, Real t, Real unit) {
  constexpr Real kUlp = std::numeric_limits<Real>::epsilon();
  return kUlp * ((8 + static_cast<Real>(size) / kLanes<Real>) / unit + 2 * std::fabs(t));
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

// One row whose tau is looked for, on a list of finite scores.
template <class Real>
struct TauSearch {
  const Real* score;
  int64_t size;
  Real score_max;  // of the list
  Real t;          // tau - score_max, in the list's units: the start, and what was found. Relative to the maximum, tau
                   // has all its digits however large the scores are.
  Real fraction;   // where the list is a sample, one in 1 / fraction, of all keys
  bool is_done;
};

// So many rows take their steps together: what one waits for (sums over lanes, a root, divisions) the others fill.
constexpr int64_t kSearchesAtOnce = 16;

// step(search, its sums) for every search that is not done, until all are or have taken most_steps.
template <bool kCounts, class Real, Exponent kExponent, class Step>
ADASPLASH2_INLINE void take_steps(const Power<Real, kExponent>& power, TauSearch<Real>* searches, int64_t count,
                                  Real unit, int most_steps, Step step) {
  Sums<Real> sums[kSearchesAtOnce];
  bool is_done = false;
  for (int steps = 0; steps < most_steps && !is_done; ++steps) {
    for (int64_t i = 0; i < count; ++i) {
      const TauSearch<Real>& search = searches[i];
      if (!search.is_done)
        sums[i] = list_sums<kCounts>(power, search.score, search.size, search.score_max, search.t, unit);
    }
    is_done = true;
    for (int64_t i = 0; i < count; ++i) {
      if (!searches[i].is_done) step(searches[i], sums[i]);
      is_done = is_done && searches[i].is_done;
    }
  }
}

// The tau of at most kSearchesAtOnce rows, from any start (the closer the better).
//
// From the left of tau: Newton on the norm, which never passes it; within reach of it for alpha = 1.5, the exact root
// of sum gap^2 = 1 over the keys above t. From the right: that root too, or Newton on the sum, which is convex, and
// lands on the left. Steps end when one is so short that what it leaves is below rounding: for alpha = 1.5 that is
// second order in the step (only keys that it crosses count), for alpha = 2 the sum is piecewise linear and the step
// itself ends it.
template <class Real, Exponent kExponent>
void find_taus(const Power<Real, kExponent>& power, TauSearch<Real>* searches, int64_t count, Real unit) {
  constexpr int kMostSteps = 100;  // 3 to 6 are usual; the bound only guards against cycles by rounding
  constexpr Real kEpsilon = std::numeric_limits<Real>::epsilon();
  const Real tolerance = (kExponent == Exponent::kSquare ? std::sqrt(kEpsilon) / 8 : 4 * kEpsilon) / unit;
  take_steps<kExponent == Exponent::kSquare>(
      power, searches, count, unit, kMostSteps, [&](TauSearch<Real>& search, const Sums<Real>& sums) {
        const Real excess = sums.prob - 1;
        if (!(sums.weight > 0)) {  // right of every score
          search.t = -1 / unit;
          return;
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
        search.t += increase;
        search.is_done = std::fabs(increase) <= tolerance;
      });
}

// Estimates of the tau of all keys from lists that are samples of them: the t with sum prob = fraction. Newton on the
// norm from a start on the left, not converged. The sum may leave out the best key, which a sample has by chance and
// whose prob can be as much as that of all others.
template <bool kWithoutBest, class Real, Exponent kExponent>
void estimate_taus(const Power<Real, kExponent>& power, TauSearch<Real>* searches, int64_t count, Real unit) {
  constexpr int kSteps = 4;
  take_steps<false>(power, searches, count, unit, kSteps, [&](TauSearch<Real>& search, Sums<Real> sums) {
    if constexpr (kWithoutBest) {
      const Vector<Real> gap = broadcast(-search.t * unit);
      sums.prob -= power.prob(gap)[0];
      sums.weight -= power.weight(gap)[0];
    }
    search.is_done = !(sums.prob > search.fraction) || !(sums.weight > 0);
    if (search.is_done) return;
    search.t += power.norm_step(sums.prob / search.fraction, sums.weight / search.fraction) / unit;
  });
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
