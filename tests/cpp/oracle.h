// tau in float64 by bisection: slow, obvious, and independent of the headers under test.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace adasplash2::test {

struct ExactSums {
  double prob = 0.0, weight = 0.0, gap = 0.0, count = 0.0;
};

inline ExactSums exact_sums(const std::vector<double>& z, double tau, double alpha) {
  const double exponent = 1.0 / (alpha - 1.0);
  ExactSums sums;
  for (const double value : z) {
    if (value <= tau) continue;
    sums.prob += std::pow(value - tau, exponent);
    sums.weight += std::pow(value - tau, exponent - 1.0);
    sums.gap += value - tau;
    sums.count += 1.0;
  }
  return sums;
}

inline double exact_tau(const std::vector<double>& z, double alpha) {
  const double row_max = *std::max_element(z.begin(), z.end());
  double low = row_max - 1.0, high = row_max;
  for (int step = 0; step < 100; ++step) {
    const double middle = 0.5 * (low + high);
    (exact_sums(z, middle, alpha).prob >= 1.0 ? low : high) = middle;
  }
  return low;
}

}  // namespace adasplash2::test
