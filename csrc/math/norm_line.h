// A lower bound for tau from two sums at one point, and how it moves (docs/algorithm.md, "Bounds without a histogram").
//
// f(t) = sum gap^b is convex and so is its norm f^(1/b): the line that touches the norm at one point lies below it
// everywhere. So the sums f and A = sum gap^(b-1) of some keys at t, of which the line is made, bound the norm of these
// keys, and all the more of all keys, at every other point: a Newton step from either side of tau ends at or left of
// it.
#pragma once

#include <cmath>

#include "math/entmax.h"
#include "math/host_device.h"

namespace adasplash2 {

// f and A of some keys at a point.
struct TailSums {
  float prob = 0.0f;
  float weight = 0.0f;
};

// Right to 2^-21 on a device, and many times faster than what rounds exactly there: bounds leave room for more.
ADASPLASH2_HOST_DEVICE float divide(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fdividef(x, y);
#else
  return x / y;
#endif
}
ADASPLASH2_HOST_DEVICE float square_root(float x) {
#ifdef __CUDA_ARCH__
  return x > 0.0f ? x * rsqrtf(x) : x;
#else
  return std::sqrt(x);
#endif
}

// norm(point + distance) >= height - slope * distance
struct NormLine {
  float height;
  float slope;

  // How far the line reaches the target: the Newton step. Negative when the point lies right of it.
  ADASPLASH2_HOST_DEVICE float step_to(float target) const { return divide(height - target, slope); }

  // Where the norm itself should reach the target: an estimate, not a bound. It takes f for a power 2 b of the distance
  // from its end, between a single key (b) and an exponential tail; far from the target, the step that is safe.
  ADASPLASH2_HOST_DEVICE float distance_to(float target) const {
    const float ratio = divide(target, height);
    return divide(height, slope) * (ratio > 0.5f ? 2.0f * (1.0f - square_root(ratio)) : 1.0f - ratio);
  }
};

template <AlphaKind kKind>
ADASPLASH2_HOST_DEVICE NormLine norm_line(const Entmax<kKind>& entmax, const TailSums& sums) {
  const float height = kKind == AlphaKind::kOneAndHalf ? square_root(sums.prob) : entmax.norm(sums.prob);
  return {height, divide(sums.weight * height, sums.prob)};
}

// What the sums should be at another point, as distance_to() has it: an estimate, not a bound.
template <AlphaKind kKind>
ADASPLASH2_HOST_DEVICE TailSums expected(const Entmax<kKind>& entmax, const TailSums& sums, float distance) {
  if (!(sums.prob > 0.0f)) return {};
  const NormLine line = norm_line(entmax, sums);
  const float left = fmaxf(1.0f - 0.5f * distance * divide(line.slope, line.height), 0.0f);
  const float height = line.height * left * left, weight = entmax.weight(height);
  return {entmax.prob(height, weight), line.slope * left * weight};
}

// What is certain of the sums at another point.
template <AlphaKind kKind>
ADASPLASH2_HOST_DEVICE TailSums moved(const Entmax<kKind>& entmax, const TailSums& sums, float distance) {
  if (!(sums.prob > 0.0f)) return {};
  const NormLine line = norm_line(entmax, sums);
  const float height = fmaxf(line.height - line.slope * distance, 0.0f);
  const float weight = entmax.weight(height);
  return {entmax.prob(height, weight), line.slope * weight};
}

}  // namespace adasplash2
