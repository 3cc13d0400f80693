// entmax itself, a key at a time: gap, prob, weight, and the steps that move tau (docs/algorithm.md, section 1).
//
//   z = (alpha - 1) * score,  gap = [z - tau]_+,  b = 1 / (alpha - 1)
//   prob = gap^b,  weight = prob^(2 - alpha) = gap^(b - 1)
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace adasplash2 {

// alpha = 1.5 and alpha = 2 need no power function; every other alpha in (1, 2] does.
enum class AlphaKind { kOneAndHalf, kTwo, kGeneral };

constexpr AlphaKind alpha_kind(double alpha) {
  return alpha == 1.5 ? AlphaKind::kOneAndHalf : alpha == 2.0 ? AlphaKind::kTwo : AlphaKind::kGeneral;
}

// x^y for x >= 0; 0^0 = 1, as the support is decided by the caller.
ADASPLASH2_HOST_DEVICE float power(float x, float y) {
#ifdef __CUDA_ARCH__
  return x > 0.0f ? exp2f(y * __log2f(x)) : (y == 0.0f ? 1.0f : 0.0f);
#else
  return std::pow(x, y);
#endif
}

// The row sums that the last step needs, all taken at one tau.
struct RowSums {
  float prob = 0.0f;    // f = sum gap^b
  float weight = 0.0f;  // A = sum gap^(b - 1)
  float count = 0.0f;   // n = number of keys with gap > 0
};

template <AlphaKind kKind>
struct Entmax {
  float alpha;

  ADASPLASH2_HOST_DEVICE float exponent() const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) return 2.0f;
    if constexpr (kKind == AlphaKind::kTwo) return 1.0f;
    return 1.0f / (alpha - 1.0f);
  }

  // gap^(b - 1); zero outside the support.
  ADASPLASH2_HOST_DEVICE float weight(float gap) const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) return gap;
    if constexpr (kKind == AlphaKind::kTwo) return gap > 0.0f ? 1.0f : 0.0f;
    return gap > 0.0f ? power(gap, exponent() - 1.0f) : 0.0f;
  }

  // gap^b, from the weight, so that a pass that needs both takes one power.
  ADASPLASH2_HOST_DEVICE float prob(float gap, float weight) const { return gap * weight; }

  // Newton on the norm f^(1/b). From a tau at or left of the root it is at least as far as Newton on f and never past
  // the root (f^(1/b) is convex and decreasing), so it keeps a lower bound a lower bound.
  ADASPLASH2_HOST_DEVICE float newton_step(const RowSums& sums) const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) return (sums.prob - sqrtf(sums.prob)) / sums.weight;
    if constexpr (kKind == AlphaKind::kTwo) return (sums.prob - 1.0f) / sums.weight;
    return (sums.prob - power(sums.prob, 2.0f - alpha)) / sums.weight;
  }

  // The last step. Exact for alpha = 1.5 and 2 if no key leaves the support on the way; if some do, tau ends a hair
  // above the root, so this is never a bound. Not negative: the mask taken at the old tau must cover the new support.
  ADASPLASH2_HOST_DEVICE float last_step(const RowSums& sums) const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) {
      // n d^2 - 2 g d + (f - 1) = 0, the smaller root in the form that does not cancel.
      const float excess = sums.prob - 1.0f;
      const float discriminant = fmaxf(sums.weight * sums.weight - sums.count * excess, 0.0f);
      return fmaxf(excess / (sums.weight + sqrtf(discriminant)), 0.0f);
    }
    return fmaxf(newton_step(sums), 0.0f);
  }
};

}  // namespace adasplash2
