// tau from exact row sums: the refinements that come before the output pass's sums, and the last step folded into them
// (docs/algorithm.md, section 4).
#pragma once

#include <cstdint>
#include <type_traits>

#include "math/entmax.h"
#include "math/histogram.h"
#include "math/power_tail.h"

namespace adasplash2 {

// NOTE: gap_mean_v is taken before the last step, so the gradients feel what remains to first order, and it must vanish
// in the rounding of 16 bits: 0.3% of the mean gap. Newton on the norm leaves up to about twice the square of its step
// (in that unit).
constexpr float kLargestLastRefinement = 0.04f;
// In that unit too: the power law is not asked for longer steps, as keys on the way need not be spread as it has them
// (at the worst, all that leave are equal: then a step of this length ends 2% of the mean gap off).
constexpr float kLongestTailStep = 0.175f;
// A row that needs more passes than these has stopped gaining from them.
constexpr int kMaxRefinements = 6;

// For results in float: tau itself must be right to the last bit or two where gap_mean_v is taken.
constexpr float kLargestLastPreciseRefinement = 0x1p-11f;

// Where the refinement of a row starts, as the scan leaves it in a byte: 0, tau_lower is good enough as it is; else tau
// is expected so many units above it, and refining it from there takes fewer passes.
constexpr float kStartUnit = 0x1p-11f;
ADASPLASH2_HOST_DEVICE uint8_t encode_start(float distance) {
  return static_cast<uint8_t>(fminf(fmaxf(distance / kStartUnit, 1.0f), 255.0f));
}

// Moves tau, at which the sums were taken, up by a step that never passes the root; at alpha = 1.5 and in 16 bits, once
// that is near, to where a power law has the root, or misses it by an error that is known. Returns whether another pass
// is worth its price: `largest_error` is for the latter, in units of the mean gap. With a precise power there is one
// more pass at least, and no room is left for rounding: a key that a tau above the root by a rounding loses is lost to
// a rounding.
template <AlphaKind kKind, typename Power>
ADASPLASH2_HOST_DEVICE bool refine(const Entmax<kKind, Power>& entmax, const RowSums& sums, float& tau,
                                   float largest_error) {
  constexpr bool kHasTail = kKind == AlphaKind::kOneAndHalf && std::is_same_v<Power, FastPower>;
  if (!(sums.prob > (kHasTail ? 0.0f : 1.0f))) return false;
  if constexpr (!std::is_same_v<Power, FastPower>) {
    const float step = entmax.newton_step(sums);
    tau += step;
    return step > kLargestLastPreciseRefinement * sums.prob / sums.weight;
  }
  const float step = entmax.newton_step(sums), mean_gap = sums.prob / sums.weight;  // by weight
  if constexpr (kHasTail) {
    const PowerTailStep tail = power_tail_step(sums);
    if (fabsf(tail.step) <= kLongestTailStep * mean_gap) {
      tau += fmaxf(step, tail.step);
      return tail.error > largest_error * mean_gap;
    }
  }
  tau = round_below(tau + step);
  return kHasTail || step > kLargestLastRefinement * mean_gap;
}

// The last step for tau and what becomes of a row's sums of values:
//   out = (A_p - shift A_w) prob_scale,  gap_mean_v = A_w weight_scale
struct OutputFold {
  float step = 0.0f;
  float shift = 0.0f;
  float prob_scale = 0.0f;  // rows without keys: zero
  float weight_scale = 0.0f;
};

template <AlphaKind kKind, typename Power>
ADASPLASH2_HOST_DEVICE OutputFold output_fold(const Entmax<kKind, Power>& entmax, const RowSums& sums, float tau) {
  OutputFold fold;
  if (sums.weight > 0.0f) {
    fold.step = entmax.last_step(sums);
    fold.shift = fold.step * entmax.exponent();
    fold.prob_scale = 1.0f / (sums.prob - fold.shift * sums.weight);
    fold.weight_scale = 1.0f / sums.weight;
  } else if (tau != tau) {
    fold.prob_scale = fold.weight_scale = tau;  // NaN: a score of the row was
  }
  return fold;
}

// prob_scale where tau stays what it is, and weights are not added up.
ADASPLASH2_HOST_DEVICE float output_scale(float prob_sum, float tau) {
  return prob_sum > 0.0f ? 1.0f / prob_sum : tau != tau ? tau : 0.0f;
}

}  // namespace adasplash2
