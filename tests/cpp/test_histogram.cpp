// The moment histogram against float64: never above the true tau, errors within the solve's own bound and within the
// accuracy that the passes count on, no refinement where supports are small, order and re-basing without effect.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "math/histogram.h"
#include "oracle.h"

namespace adasplash2::test {
namespace {

// One row's histogram, fed as the scan feeds it: in batches, each batch's maximum first.
struct Row {
  float score_to_z = 1.0f;
  float row_max = -std::numeric_limits<float>::infinity();
  Bin slots[kNumSlots] = {};

  void add(const std::vector<float>& scores) {
    const float batch_max = *std::max_element(scores.begin(), scores.end());
    if (batch_max > row_max) {
      const HistogramGrid grid(batch_max, score_to_z);
      if (std::isfinite(row_max)) {
        const int num_stale = grid.num_stale_slots(HistogramGrid(row_max, score_to_z));
        for (int i = 0; i < num_stale; ++i) slots[HistogramGrid::slot_of(grid.top_bin - i)] = Bin();
      }
      row_max = batch_max;
    }
    const HistogramGrid grid(row_max, score_to_z);
    for (const float score : scores) {
      if (score * score_to_z <= row_max * score_to_z - 1.0f) continue;
      const uint32_t code = grid.encode(score);
      const uint32_t bin = HistogramGrid::bin_of(code), quantum = HistogramGrid::quantum_of(code);
      if (grid.is_below_window(bin)) continue;
      Bin& slot = slots[HistogramGrid::slot_of(bin)];
      slot.count += 1;
      slot.sum += quantum;
      slot.sum_squares += quantum * quantum >> kQuantumBits;
    }
  }

  template <AlphaKind kKind>
  TauBound solve(double alpha) const {
    return adasplash2::solve(HistogramGrid(row_max, score_to_z), Entmax<kKind>{static_cast<float>(alpha)},
                             [this](uint32_t slot) { return slots[slot]; });
  }
  TauBound solve(double alpha) const {
    if (alpha_kind(alpha) == AlphaKind::kOneAndHalf) return solve<AlphaKind::kOneAndHalf>(alpha);
    if (alpha_kind(alpha) == AlphaKind::kTwo) return solve<AlphaKind::kTwo>(alpha);
    return solve<AlphaKind::kGeneral>(alpha);
  }
};

TauBound solve_in_batches(const std::vector<float>& scores, float score_to_z, double alpha, size_t batch = 64) {
  Row row;
  row.score_to_z = score_to_z;
  for (size_t begin = 0; begin < scores.size(); begin += batch)
    row.add({scores.begin() + begin, scores.begin() + std::min(scores.size(), begin + batch)});
  return row.solve(alpha);
}

std::vector<double> exact_z(const std::vector<float>& scores, float score_to_z) {
  std::vector<double> z;
  for (const float score : scores) z.push_back(static_cast<double>(score) * score_to_z);
  return z;
}

std::vector<float> gaussian(int num_keys, double sd, double mean, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(static_cast<float>(mean), static_cast<float>(sd));
  std::vector<float> scores(num_keys);
  for (float& score : scores) score = normal(random);
  return scores;
}

void bound_holds(const char* name, const std::vector<float>& scores, float score_to_z, double alpha) {
  const std::vector<double> z = exact_z(scores, score_to_z);
  const double tau = exact_tau(z, alpha);
  const TauBound bound = solve_in_batches(scores, score_to_z, alpha);
  // The grid's own factor is score_to_z rounded once more (2^-24 of z).
  const double slack = std::abs(tau) * 0x1p-21 + 0x1p-19;
  check(bound.tau_lower <= tau, name, ": tau_lower ", bound.tau_lower, " above tau ", tau, ", alpha ", alpha);
  check(tau - bound.tau_lower <= bound.error + slack, name, ": error ", tau - bound.tau_lower, " above its bound ",
        bound.error, ", alpha ", alpha, ", keys ", scores.size());
}

void never_above_tau_and_within_its_own_bound() {
  for (const double alpha : {1.5, 2.0, 1.75, 1.25, 1.1}) {
    for (uint32_t seed = 0; seed < 6; ++seed) {
      for (const int num_keys : {1, 2, 5, 64, 257, 4096}) {
        for (const double sd : {0.01, 0.1, 0.5, 2.0, 10.0}) {
          bound_holds("gaussian", gaussian(num_keys, sd / (alpha - 1.0), 3.0 * seed, seed), float(alpha - 1.0), alpha);
        }
      }
    }
    bound_holds("constant", std::vector<float>(1000, 7.25f), 0.5f, alpha);
    bound_holds("far from zero", gaussian(1000, 0.3, 5000.0, 1), 0.5f, alpha);
    bound_holds("far below zero", gaussian(1000, 0.3, -5000.0, 2), 0.5f, alpha);
    std::vector<float> rising(3000), ties(600), edges(64);
    for (size_t i = 0; i < rising.size(); ++i) rising[i] = -100.0f + 0.07f * i;
    for (size_t i = 0; i < ties.size(); ++i) ties[i] = 0.1f * (i % 7);
    for (size_t i = 0; i < edges.size(); ++i) edges[i] = static_cast<float>(i) / kBinsPerUnit;
    bound_holds("rising", rising, 0.5f, alpha);
    bound_holds("ties", ties, 1.0f, alpha);
    bound_holds("bin edges", edges, 1.0f, alpha);
    // One key far ahead and many just above row_max - 1: the keys of the lowest bin decide.
    std::vector<float> shelf(2000, 0.005f);
    shelf[77] = 1.0f;
    bound_holds("shelf", shelf, 1.0f, alpha);
  }
}

// docs/algorithm.md quotes these bounds. Supports are means over the rows.
void accuracy_by_support() {
  struct Case {
    int num_keys;
    double sd, largest_error;
    bool may_refine;
  };
  for (const Case& c : {Case{4096, 1.5, 1.1e-4, false}, Case{4096, 0.3, 3e-4, false}, Case{32768, 0.3, 3e-4, false},
                        Case{8192, 0.12, 8e-4, false}, Case{32768, 0.05, 2.5e-3, true}}) {
    double worst = 0.0, support = 0.0;
    int num_refined = 0;
    constexpr int kRows = 12;
    for (uint32_t seed = 0; seed < kRows; ++seed) {
      const std::vector<float> scores = gaussian(c.num_keys, c.sd, 0.37 * seed, seed);
      const std::vector<double> z = exact_z(scores, 1.0f);
      const double tau = exact_tau(z, 1.5);
      const TauBound bound = solve_in_batches(scores, 1.0f, 1.5);
      worst = std::max(worst, tau - bound.tau_lower);
      support += exact_sums(z, tau, 1.5).count / kRows;
      num_refined += bound.needs_refinement();
      const ExactSums sums = exact_sums(z, tau, 1.5);
      const double shift = (tau - bound.tau_lower) * sums.count / sums.gap;
      check(bound.needs_refinement() || shift <= 1.1 * kMaxRelativeShift, "support ", sums.count, ": shift ", shift,
            " not flagged");
    }
    check(worst <= c.largest_error, "support ", support, ": worst error ", worst, " above ", c.largest_error);
    check(c.may_refine || num_refined == 0, "support ", support, ": ", num_refined, " rows flagged for refinement");
    check(!c.may_refine || num_refined > 0, "support ", support, ": no row flagged");
  }
}

void order_does_not_matter() {
  std::vector<float> scores = gaussian(1000, 1.0, 0.0, 5);
  const TauBound forwards = solve_in_batches(scores, 0.5f, 1.5);
  std::reverse(scores.begin(), scores.end());
  const TauBound backwards = solve_in_batches(scores, 0.5f, 1.5, 17);
  check(forwards.tau_lower == backwards.tau_lower, "forwards ", forwards.tau_lower, " backwards ", backwards.tau_lower);
}

void largest_row_does_not_overflow() {
  Row row;
  const HistogramGrid grid(row.row_max = 2.99999f, 1.0f);
  Bin& slot = row.slots[HistogramGrid::slot_of(grid.top_bin)];
  const uint32_t quantum = HistogramGrid::quantum_of(grid.encode(row.row_max));
  for (int64_t key = 0; key < kMaxKeys; ++key) {
    const uint32_t before = slot.sum;
    slot.count += 1;
    slot.sum += quantum;
    slot.sum_squares += quantum * quantum >> kQuantumBits;
    check(slot.sum >= before, "sum wrapped at key ", key);
  }
  const double tau = 2.99999f - std::sqrt(1.0 / kMaxKeys);
  check(std::abs(row.solve(1.5).tau_lower - tau) < 1e-5, "2^20 equal keys: ", row.solve(1.5).tau_lower, " for ", tau);
}

}  // namespace
}  // namespace adasplash2::test

int main() {
  using namespace adasplash2::test;
  never_above_tau_and_within_its_own_bound();
  accuracy_by_support();
  order_does_not_matter();
  largest_row_does_not_overflow();
  return result();
}
