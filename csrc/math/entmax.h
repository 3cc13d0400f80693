// entmax itself, a key at a time: gap, prob, weight, and the steps that move tau (docs/algorithm.md, section 1).
//
//   z = (alpha - 1) * score,  gap = [z - tau]_+,  b = 1 / (alpha - 1)
//   prob = gap^b,  weight = prob^(2 - alpha) = gap^(b - 1)
#pragma once

#include <cmath>
#include <type_traits>

#include "math/host_device.h"

namespace adasplash2 {

// alpha = 1.5 and alpha = 2 need no power function; every other alpha in (1, 2] does.
enum class AlphaKind { kOneAndHalf, kTwo, kGeneral };

constexpr AlphaKind alpha_kind(double alpha) {
  return alpha == 1.5 ? AlphaKind::kOneAndHalf : alpha == 2.0 ? AlphaKind::kTwo : AlphaKind::kGeneral;
}

// How a device takes x^y for x >= 0 (0^0 = 1, as the support is decided by the caller), and the type it works in.
struct FastPower {  // 2^-21 of log2 x is lost: enough for results of 16 bits
  using Real = float;
  ADASPLASH2_HOST_DEVICE static float of(float x, float y) {
#ifdef __CUDA_ARCH__
    return x > 0.0f ? exp2f(y * __log2f(x)) : (y == 0.0f ? 1.0f : 0.0f);
#else
    return std::pow(x, y);
#endif
  }
};

template <typename Number>
struct PrecisePower {  // right to about 2 + |log2 x^y| roundings
  using Real = Number;
  ADASPLASH2_HOST_DEVICE static Real of(Real x, Real y) {
    return x > Real(0) ? std::exp2(y * std::log2(x)) : Real(y == Real(0) ? 1 : 0);
  }
};

// The row sums that the last step needs, all taken at one tau.
template <typename Real>
struct RowSumsOf {
  Real prob = 0;    // f = sum gap^b
  Real weight = 0;  // A = sum gap^(b - 1)
  Real count = 0;   // n = number of keys with gap > 0
};
using RowSums = RowSumsOf<float>;

template <AlphaKind kKind, typename Power = FastPower>
struct Entmax {
  using Real = typename Power::Real;
  Real alpha;

  ADASPLASH2_HOST_DEVICE Real exponent() const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) return 2;
    if constexpr (kKind == AlphaKind::kTwo) return 1;
    return 1 / (alpha - 1);
  }

  // gap^(b - 1); zero outside the support.
  ADASPLASH2_HOST_DEVICE Real weight(Real gap) const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) return gap;
    if constexpr (kKind == AlphaKind::kTwo) return gap > 0 ? 1 : 0;
    return gap > 0 ? Power::of(gap, exponent() - 1) : 0;
  }

  // gap^b, from the weight, so that a pass that needs both takes one power.
  ADASPLASH2_HOST_DEVICE Real prob(Real gap, Real weight) const { return gap * weight; }

  // prob^(2 - alpha), the same weight, from a prob that is not zero; NaN from NaN.
  ADASPLASH2_HOST_DEVICE Real weight_of_prob(Real prob) const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) return std::sqrt(prob);
    if constexpr (kKind == AlphaKind::kTwo) return prob > 0 ? 1 : prob;
    return prob > 0 ? Power::of(prob, 2 - alpha) : prob;
  }

  // The norm f^(1/b) of f.
  ADASPLASH2_HOST_DEVICE Real norm(Real prob_sum) const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) return std::sqrt(prob_sum);
    if constexpr (kKind == AlphaKind::kTwo) return prob_sum;
    return Power::of(prob_sum, alpha - 1);
  }

  // Newton on the norm f^(1/b). From a tau at or left of the root it is at least as far as Newton on f and never past
  // the root (f^(1/b) is convex and decreasing), so it keeps a lower bound a lower bound.
  ADASPLASH2_HOST_DEVICE Real newton_step(const RowSumsOf<Real>& sums) const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) return (sums.prob - std::sqrt(sums.prob)) / sums.weight;
    if constexpr (kKind == AlphaKind::kTwo) return (sums.prob - 1) / sums.weight;
    return (sums.prob - Power::of(sums.prob, 2 - alpha)) / sums.weight;
  }

  // The last step. Exact for alpha = 1.5 and 2 if no key leaves the support on the way, or joins it; if some do, tau
  // ends a hair off the root, so this is never a bound. Negative at alpha = 1.5 and in 16 bits alone: see refine().
  ADASPLASH2_HOST_DEVICE Real last_step(const RowSumsOf<Real>& sums) const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) {
      // n d^2 - 2 g d + (f - 1) = 0, the smaller root in the form that does not cancel.
      const Real excess = sums.prob - 1;
      const Real discriminant = std::fmax(sums.weight * sums.weight - sums.count * excess, Real(0));
      const Real step = excess / (sums.weight + std::sqrt(discriminant));
      return std::is_same_v<Power, FastPower> ? step : std::fmax(step, Real(0));
    }
    return std::fmax(newton_step(sums), Real(0));
  }
};

// The row sums that the gradients need, with h = -p log p; dP is the gradient by prob.
template <typename Real>
struct GradSums {
  Real weight, weight_grad;               // sum w, sum w dP
  Real prob_grad, entropy, entropy_grad;  // sum p dP, sum h, sum h dP

  ADASPLASH2_HOST_DEVICE void add(Real p, Real w, Real grad, Real h) {
    weight += w;
    weight_grad += w * grad;
    prob_grad += p * grad;
    entropy += h;
    entropy_grad += h * grad;
  }

  ADASPLASH2_HOST_DEVICE Real delta() const { return weight == 0 ? 0 : weight_grad / weight; }

  // <dP, dprob / dalpha>
  ADASPLASH2_HOST_DEVICE Real by_alpha(Real alpha) const {
    const Real b = 1 / (alpha - 1);
    return b * (b * (prob_grad - delta()) + (entropy_grad - delta() * entropy));
  }
};

}  // namespace adasplash2
