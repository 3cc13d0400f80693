// tau from the sums at a point near it, alpha = 1.5: not a bound, but better (docs/algorithm.md, section 4).
//
// f(t) = sum gap^2 has f' = -2 g and f'' = 2 n, known from the keys above t; the keys that leave the support on the way
// to the root, or join it, are not. A power law that has these three in common with f stands for them:
//
//   f(t + d) = f (1 - x / p)^p,   x = 2 g d / f,   1 - 1 / p = n f / (2 g^2)
//
// A single key is p = 2, an exponential tail is p = inf, and what is heavier has a negative p.
#pragma once

#include <cmath>

#include "math/entmax.h"
#include "math/host_device.h"

namespace adasplash2 {

struct PowerTailStep {
  float step;   // to where f should be 1
  float error;  // about how wrong that is, either way: half of all rows are within 0.6 of it, 99% within 2.7
};

// From a point on either side, with a key above it.
ADASPLASH2_HOST_DEVICE PowerTailStep power_tail_step(const RowSums& sums) {
  const float half_unit = 0.5f * sums.prob / sums.weight;  // d = half_unit x
  const float curvature = fminf(sums.count * half_unit / sums.weight, 2.0f), inverse_p = 1.0f - curvature;
  // x = p (1 - f^(-1/p)) = log f (1 - exp(-u)) / u with u = log f / p
  const float log_prob = logf(sums.prob), u = fminf(fmaxf(log_prob * inverse_p, -1.0f), 1.0f);
  const float x =
      log_prob * (1.0f - u * (1 / 2.0f - u * (1 / 6.0f - u * (1 / 24.0f - u * (1 / 120.0f - u * (1 / 720.0f))))));
  // About n (1 - 2 / p) x keys leave (or join), and each takes (d - y)^2 of f with y evenly spread over d: that
  // scatters by sqrt(keys / 5) d^2, of the slope 2 g of f. Keys that seem to be equal need not be.
  const float leaving = fmaxf(1.0f - 2.0f * inverse_p, 0.25f);
  return {half_unit * x, half_unit * curvature * x * x * sqrtf(leaving * fabsf(x) / (20.0f * sums.count))};
}

}  // namespace adasplash2
