// Lines below the norm against float64: wherever the sums are taken and however often they are moved, what they say of
// tau is never too much, and a step from near tau lands close to it.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "math/norm_line.h"
#include "oracle.h"

namespace adasplash2::test {
namespace {

constexpr double kRounding = 2e-5;

std::vector<double> gaussian(int num_keys, double deviation, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0.0, deviation);
  std::vector<double> z(num_keys);
  for (double& value : z) value = static_cast<float>(normal(generator));
  return z;
}

TailSums sums_at(const std::vector<double>& z, double point, double alpha) {
  const ExactSums exact = exact_sums(z, point, alpha);
  return {static_cast<float>(exact.prob), static_cast<float>(exact.weight)};
}

template <AlphaKind kKind>
void test_lines(double alpha, double deviation, uint32_t seed) {
  const Entmax<kKind> entmax{static_cast<float>(alpha)};
  const std::vector<double> z = gaussian(500, deviation, seed);
  const double tau = exact_tau(z, alpha), exponent = 1.0 / (alpha - 1.0);
  for (const double offset : {-0.3, -0.1, -0.03, -0.01, 0.0, 0.01, 0.03}) {
    const double point = tau + offset * deviation;
    const TailSums sums = sums_at(z, point, alpha);
    const NormLine line = norm_line(entmax, sums);
    check(std::fabs(line.height - std::pow(sums.prob, 1.0 / exponent)) <= kRounding * line.height, "height");
    const double bound = point + line.step_to(1.0f);
    check(bound <= tau + kRounding, "alpha ", alpha, " from ", offset, ": bound ", bound, " above tau ", tau);
    // Newton's method: what remains is quadratic in what there was.
    check(tau - bound <= 4.0 * exponent * offset * offset * deviation * deviation / 0.1 + kRounding, "alpha ", alpha,
          " from ", offset, ": bound ", bound, " far below tau ", tau);
    for (const double distance : {-0.5, -0.1, 0.02, 0.1, 0.5, 2.0}) {
      const TailSums elsewhere = moved(entmax, sums, static_cast<float>(distance * deviation));
      const ExactSums exact = exact_sums(z, point + distance * deviation, alpha);
      check(elsewhere.prob <= exact.prob * (1.0 + kRounding * exponent) + 1e-6, "alpha ", alpha, " moved by ", distance,
            ": f ", elsewhere.prob, " above ", exact.prob);
      check(elsewhere.prob >= 0.0f && elsewhere.weight >= 0.0f, "alpha ", alpha, ": negative sums");
    }
  }
}

// Two halves of the keys, the first taken elsewhere and moved, are a bound for all.
template <AlphaKind kKind>
void test_parts(double alpha, uint32_t seed) {
  const Entmax<kKind> entmax{static_cast<float>(alpha)};
  const std::vector<double> z = gaussian(400, 0.3, seed);
  const std::vector<double> first(z.begin(), z.begin() + 200), second(z.begin() + 200, z.end());
  const double tau = exact_tau(z, alpha);
  for (const double from : {tau - 0.2, tau - 0.05, tau + 0.02}) {
    for (const double to : {tau - 0.1, tau - 0.01, tau + 0.01}) {
      TailSums sums = moved(entmax, sums_at(first, from, alpha), static_cast<float>(to - from));
      const TailSums others = sums_at(second, to, alpha);
      sums.prob += others.prob;
      sums.weight += others.weight;
      const double bound = to + norm_line(entmax, sums).step_to(1.0f);
      check(bound <= tau + kRounding, "alpha ", alpha, ": bound of two parts ", bound, " above tau ", tau);
    }
  }
}

// The estimate is exact where it says that it is: for a norm that is a square of the distance from its end. Far from
// the target it is the safe step.
void test_estimate() {
  for (const float end : {0.5f, 1.0f, 1.4f}) {
    const NormLine line{end * end, 2.0f * end};
    for (const float ratio : {0.55f, 0.8f, 1.0f, 1.3f}) {
      const float target = ratio * line.height, expected = end - std::sqrt(target);
      check(std::fabs(line.distance_to(target) - expected) <= kRounding, "distance ", line.distance_to(target),
            " expected ", expected);
    }
    check(line.distance_to(0.1f * line.height) == line.step_to(0.1f * line.height), "far away: the safe step");

    // At alpha = 1.5, so f = norm^2 and A = slope norm.
    const Entmax<AlphaKind::kOneAndHalf> entmax{1.5f};
    const TailSums sums{line.height * line.height, line.slope * line.height};
    for (const float distance : {-0.2f, 0.0f, 0.3f}) {
      const float left = end - distance, height = left * left, slope = 2.0f * left;
      const TailSums there = expected(entmax, sums, distance);
      check(std::fabs(there.prob - height * height) <= kRounding, "f ", there.prob, " expected ", height * height);
      check(std::fabs(there.weight - slope * height) <= kRounding, "A ", there.weight, " expected ", slope * height);
    }
    const TailSums past_end = expected(entmax, sums, end + 0.1f);
    check(past_end.prob == 0.0f && past_end.weight == 0.0f, "nothing past the end");
  }
}

void test_nothing() {
  const Entmax<AlphaKind::kOneAndHalf> entmax{1.5f};
  for (const float distance : {0.0f, -1.0f, INFINITY}) {
    const TailSums sums = moved(entmax, TailSums{}, distance);
    check(sums.prob == 0.0f && sums.weight == 0.0f, "no keys stay no keys");
    const TailSums likely = expected(entmax, TailSums{}, distance);
    check(likely.prob == 0.0f && likely.weight == 0.0f, "no keys are expected where there are none");
  }
}

}  // namespace
}  // namespace adasplash2::test

int main() {
  using namespace adasplash2;
  using namespace adasplash2::test;
  for (uint32_t seed = 0; seed < 5; ++seed) {
    for (const double deviation : {0.05, 0.3, 1.0}) {
      test_lines<AlphaKind::kOneAndHalf>(1.5, deviation, seed);
      test_lines<AlphaKind::kTwo>(2.0, deviation, seed);
      test_lines<AlphaKind::kGeneral>(1.25, deviation, seed);
      test_lines<AlphaKind::kGeneral>(1.7, deviation, seed);
    }
    test_parts<AlphaKind::kOneAndHalf>(1.5, seed);
    test_parts<AlphaKind::kTwo>(2.0, seed);
    test_parts<AlphaKind::kGeneral>(1.25, seed);
  }
  test_estimate();
  test_nothing();
  return result();
}
