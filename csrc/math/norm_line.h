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

// What stands for the norm where no line will do: so high a power of the distance from where it ends. A single key has
// the first power, an exponential tail has none.
// NOTE: the tails of Gaussian scores follow the fourth power, supports of a few keys or of a large part of them the
// second, those of nearly all keys the first: with these the tau expected after a scan of 16384 keys is off by 0.00 +- 0.016 of the mean gap (by weight,
// support 100; with the second alone 0.037 +- 0.016), -0.02 +- 0.04 (support 10) and 0.005 +- 0.004 (half of the keys).
enum class NormTail { kNone = 1, kShort = 2, kLong = 4 };

ADASPLASH2_HOST_DEVICE float root(float x, NormTail tail) {
  if (tail == NormTail::kNone) return x;
  const float square = square_root(x);
  return tail == NormTail::kLong ? square_root(square) : square;
}

// As many equal keys would have these sums.
ADASPLASH2_HOST_DEVICE float num_equal_keys(const TailSums& sums) {
  return sums.prob > 0.0f ? divide(sums.weight * sums.weight, sums.prob) : 0.0f;
}
// Of sums over the support of so many keys.
ADASPLASH2_HOST_DEVICE NormTail norm_tail(const TailSums& sums, int num_keys) {
  const float num_equal = num_equal_keys(sums);
  if (num_equal > 0.45f * num_keys) return NormTail::kNone;
  return num_equal >= 24.0f && num_equal < num_keys / 16.0f ? NormTail::kLong : NormTail::kShort;
}

// norm(point + distance) >= height - slope * distance
struct NormLine {
  float height;
  float slope;

  // How far the line reaches the target: the Newton step. Negative when the point lies right of it.
  ADASPLASH2_HOST_DEVICE float step_to(float target) const { return divide(height - target, slope); }

  // Where the norm itself should reach the target: an estimate, not a bound, from the tail that the sums suggest. Far
  // from the target, the step that is safe.
  ADASPLASH2_HOST_DEVICE float distance_to(float target, NormTail tail) const {
    const float ratio = divide(target, height), power = static_cast<float>(tail);
    return divide(height, slope) * (ratio > 0.5f ? power * (1.0f - root(ratio, tail)) : 1.0f - ratio);
  }
};

template <AlphaKind kKind>
ADASPLASH2_HOST_DEVICE NormLine norm_line(const Entmax<kKind>& entmax, const TailSums& sums) {
  const float height = kKind == AlphaKind::kOneAndHalf ? square_root(sums.prob) : entmax.norm(sums.prob);
  return {height, divide(sums.weight * height, sums.prob)};
}

// What the sums should be at another point, with that tail: an estimate, not a bound.
template <AlphaKind kKind>
ADASPLASH2_HOST_DEVICE TailSums expected(const Entmax<kKind>& entmax, const TailSums& sums, float distance,
                                         NormTail tail) {
  if (!(sums.prob > 0.0f)) return {};
  const NormLine line = norm_line(entmax, sums);
  const float left = fmaxf(1.0f - distance * divide(line.slope, line.height * static_cast<float>(tail)), 0.0f);
  const float slope_left = tail == NormTail::kLong ? left * left * left : tail == NormTail::kShort ? left : 1.0f;
  const float height = line.height * left * slope_left, weight = entmax.weight(height);
  return {entmax.prob(height, weight), line.slope * slope_left * weight};
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
