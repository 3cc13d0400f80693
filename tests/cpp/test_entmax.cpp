// The steps for tau against float64: Newton on the norm stays left of tau and beats Newton on f; the last step is
// exact.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "math/entmax.h"
#include "oracle.h"

namespace adasplash2::test {
namespace {

template <AlphaKind kKind>
RowSums row_sums(const Entmax<kKind>& entmax, const std::vector<double>& z, double tau) {
  RowSums sums;
  for (const double value : z) {
    const float gap = std::fmax(static_cast<float>(value - tau), 0.0f);
    const float weight = entmax.weight(gap);
    sums.weight += weight;
    sums.prob += entmax.prob(gap, weight);
    sums.count += gap > 0.0f;
  }
  return sums;
}

template <AlphaKind kKind>
void steps_for(double alpha) {
  const Entmax<kKind> entmax{static_cast<float>(alpha)};
  std::mt19937 random(3);
  for (const double sd : {0.05, 0.3, 1.0, 4.0}) {
    for (const int num_keys : {1, 3, 100, 2000}) {
      std::normal_distribution<double> normal(0.0, sd);
      std::vector<double> z(num_keys);
      for (double& value : z) value = normal(random);
      const double tau = exact_tau(z, alpha);

      for (const double start : {1.0, 0.1, 1e-3}) {
        const double from = std::max(tau - start, *std::max_element(z.begin(), z.end()) - 1.0);
        const RowSums sums = row_sums(entmax, z, from);
        const double step = entmax.newton_step(sums);
        const double newton_on_f = (sums.prob - 1.0) / (entmax.exponent() * sums.weight);
        check(from + step <= tau + 4e-6, "alpha ", alpha, ": norm step to ", from + step, " past tau ", tau);
        check(step >= newton_on_f - 4e-6, "alpha ", alpha, ": norm step ", step, " shorter than ", newton_on_f);
      }

      // No key leaves the support between tau - distance and tau: alpha = 1.5 and 2 land on tau to rounding, others
      // to second order: (b + 1) / 2 d^2 A'/A <= (b + 1) / 2 * d^2 * largest gap^-1 ratio, measured below 40 d^2.
      double smallest_gap = 1.0;
      for (const double value : z) smallest_gap = value > tau ? std::min(smallest_gap, value - tau) : smallest_gap;
      double largest_below = tau - 1.0;
      for (const double value : z) largest_below = value <= tau ? std::max(largest_below, value) : largest_below;
      const double distance = 0.5 * std::min({tau - largest_below, smallest_gap, 1e-3});
      const double landed = tau - distance + entmax.last_step(row_sums(entmax, z, tau - distance));
      const double second_order = kKind == AlphaKind::kGeneral ? 40.0 * distance * distance : 0.0;
      check(std::abs(landed - tau) <= 1e-6 + second_order, "alpha ", alpha, ": last step lands ", landed - tau,
            " from tau, from ", distance);
    }
  }
  // From the right of the root: exact at alpha = 1.5, not at all where it would not be.
  const double back = kKind == AlphaKind::kOneAndHalf ? 1.0 - std::sqrt(1.001) : 0.0;
  check(std::fabs(entmax.last_step({0.999f, 1.0f, 1.0f}) - back) <= 1e-7, "alpha ", alpha, ": the last step back");
  check(entmax.weight(0.0f) == 0.0f, "alpha ", alpha, ": weight outside the support");
}

}  // namespace
}  // namespace adasplash2::test

int main() {
  using namespace adasplash2::test;
  using adasplash2::AlphaKind;
  steps_for<AlphaKind::kOneAndHalf>(1.5);
  steps_for<AlphaKind::kTwo>(2.0);
  for (const double alpha : {1.1, 1.25, 1.5, 1.75, 2.0}) steps_for<AlphaKind::kGeneral>(alpha);
  return result();
}
