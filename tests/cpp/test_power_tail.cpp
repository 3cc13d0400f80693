// Steps by a power tail against float64: how near they end, whether they know it, and what a refinement makes of them.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "math/refinement.h"
#include "oracle.h"

namespace adasplash2::test {
namespace {

constexpr double kAlpha = 1.5;
constexpr AlphaKind kKind = AlphaKind::kOneAndHalf;
constexpr float kLargestError = 0.002f;
constexpr double kRounding = 3e-6;

RowSums sums_at(const std::vector<double>& z, double point) {
  const ExactSums exact = exact_sums(z, point, kAlpha);
  return {static_cast<float>(exact.prob), static_cast<float>(exact.weight), static_cast<float>(exact.count)};
}

double mean_gap_at(const std::vector<double>& z, double tau) {
  const ExactSums exact = exact_sums(z, tau, kAlpha);
  return exact.prob / exact.weight;
}

// Keys whose density is the power law's itself, evenly spaced: there is no scatter, and the step is exact.
void test_exact() {
  for (const double power : {2.5, 3.0, 5.0, 20.0, -8.0}) {
    // The fraction of keys above y; f(y) goes with (1 - y / p)^p.
    std::vector<double> z;
    const int num_keys = 20000;
    for (int i = 0; i < num_keys; ++i) {
      const double above = (i + 0.5) / num_keys;
      z.push_back(0.02 * power * (1.0 - std::pow(above, 1.0 / (power - 2.0))));
    }
    const double tau = exact_tau(z, kAlpha), mean_gap = mean_gap_at(z, tau);
    for (const double offset : {-0.1, 0.02, 0.1, 0.2}) {
      if (tau - offset * mean_gap < 0.0) continue;  // below the lowest key
      const double end = tau - offset * mean_gap + power_tail_step(sums_at(z, tau - offset * mean_gap)).step;
      check(std::fabs(end - tau) <= 1e-3 * std::fabs(offset) * mean_gap + kRounding, "power ", power, " from ", offset,
            " mean gaps: ends ", (end - tau) / mean_gap, " mean gaps off");
    }
  }
}

struct Tail {
  const char* name;
  std::vector<double> (*draw)(std::mt19937& generator);
};

std::vector<double> gaussian(std::mt19937& generator, int num_keys, double deviation) {
  std::normal_distribution<double> normal(0.0, deviation);
  std::vector<double> z(num_keys);
  for (double& value : z) value = static_cast<float>(normal(generator));
  return z;
}

const Tail kTails[] = {
    {"Gaussian, few keys", [](std::mt19937& generator) { return gaussian(generator, 300, 1.0); }},
    {"Gaussian", [](std::mt19937& generator) { return gaussian(generator, 2000, 0.3); }},
    {"Gaussian, many keys", [](std::mt19937& generator) { return gaussian(generator, 3000, 0.1); }},
    {"uniform",
     [](std::mt19937& generator) {
       std::uniform_real_distribution<double> uniform(-3.0, 0.0);
       std::vector<double> z(1500);
       for (double& value : z) value = static_cast<float>(uniform(generator));
       return z;
     }},
    {"Student's t",
     [](std::mt19937& generator) {
       std::student_t_distribution<double> student(5.0);
       std::vector<double> z(2000);
       for (double& value : z) value = static_cast<float>(0.05 * student(generator));
       return z;
     }},
};

void test_scatter() {
  constexpr int kRows = 400;
  std::mt19937 generator(7);
  for (const Tail& tail : kTails) {
    for (const double offset : {-0.1, -0.05, 0.05, 0.1, 0.2}) {
      std::vector<double> ratios;
      int num_done = 0;
      for (int row = 0; row < kRows; ++row) {
        const std::vector<double> z = tail.draw(generator);
        const double tau = exact_tau(z, kAlpha), mean_gap = mean_gap_at(z, tau);
        const float start = static_cast<float>(tau - offset * mean_gap);
        const RowSums sums = sums_at(z, start);
        const Entmax<kKind> entmax{static_cast<float>(kAlpha)};
        const PowerTailStep step = power_tail_step(sums);
        ratios.push_back(std::fabs(start + step.step - tau) / (step.error + kRounding));

        float refined = start;
        const bool goes_on = refine(entmax, sums, refined, kLargestError);
        check(refined >= start + entmax.newton_step(sums) - kRounding, tail.name, ": short of Newton's step");
        if (goes_on) continue;
        ++num_done;
        check(std::fabs(tau - refined) <= 6.0 * kLargestError * mean_gap, tail.name, " from ", offset, ": ",
              (tau - refined) / mean_gap, " mean gaps off, and done");
      }
      std::sort(ratios.begin(), ratios.end());
      const double median = ratios[ratios.size() / 2], high = ratios[ratios.size() * 99 / 100];
      check(median <= 1.0 && high <= 6.0, tail.name, " from ", offset, ": errors of ", median, " (median) and ", high,
            " (99%) of what was expected");
      check(std::fabs(offset) > 0.1 || num_done > kRows / 2, tail.name, " from ", offset, ": only ", num_done,
            " rows done");
    }
  }
}

// One key, and equal keys: no scatter and no doubt.
void test_ties() {
  for (const int num_keys : {1, 2, 7}) {
    const std::vector<double> z(num_keys, 0.25);
    const double tau = exact_tau(z, kAlpha);
    for (const double offset : {-0.05, 1e-3, 0.05, 0.3}) {
      const float start = static_cast<float>(tau - offset);
      const PowerTailStep step = power_tail_step(sums_at(z, start));
      check(std::fabs(start + step.step - tau) <= 5e-6, num_keys, " equal keys from ", offset, ": ends ",
            start + step.step - tau, " off");
    }
  }
}

// What no power law describes: many keys far below the support, or equal keys at its border. Refined from a bound, a
// row still ends near tau, and in time.
void test_clusters() {
  std::mt19937 generator(5);
  for (const int num_keys : {20, 1000}) {
    for (const double distance : {0.02, 0.1, 0.3, 0.9, 0.999}) {
      for (const double width : {0.0, 0.01}) {
        std::vector<double> z = gaussian(generator, num_keys, width);
        for (double& value : z) value = static_cast<float>(value - distance);
        z.push_back(0.0);
        const double tau = exact_tau(z, kAlpha), mean_gap = mean_gap_at(z, tau);
        float refined = static_cast<float>(tau - 0.3);
        int num_passes = 1;
        while (refine(Entmax<kKind>{static_cast<float>(kAlpha)}, sums_at(z, refined), refined, kLargestError))
          ++num_passes;
        check(std::fabs(tau - refined) <= 0.025 * mean_gap + kRounding && num_passes <= kMaxRefinements, num_keys,
              " keys ", distance, " below the first, over ", width, ": ", (tau - refined) / mean_gap,
              " mean gaps off after ", num_passes, " passes");
      }
    }
  }
}

}  // namespace
}  // namespace adasplash2::test

int main() {
  adasplash2::test::test_exact();
  adasplash2::test::test_scatter();
  adasplash2::test::test_ties();
  adasplash2::test::test_clusters();
  return adasplash2::test::result();
}
