// tau from exact row sums: the refinements that come before the output pass's sums, and the last step folded into them
// (docs/algorithm.md, section 4).
#pragma once

#include <type_traits>

#include "math/entmax.h"
#include "math/histogram.h"

namespace adasplash2 {

// NOTE: gap_mean_v is taken before the last step, so the gradients feel what remains to first order, and it must vanish
// in the rounding of 16 bits. Newton on the norm leaves up to about twice the square of its step (in units of the mean
// gap): 0.3%. A row that needs more passes than these has stopped gaining from them.
constexpr float kLargestLastRefinement = 0.04f;
constexpr int kMaxRefinements = 6;

// For results in float: tau itself must be right to the last bit or two where gap_mean_v is taken.
constexpr float kLargestLastPreciseRefinement = 0x1p-11f;

// Moves tau, a lower bound at which the sums were taken, up and never past the root. Returns whether another pass is
// worth its price. With a precise power there is one more pass at least, and no room is left for rounding: a key that a
// tau above the root by a rounding loses is lost to a rounding.
template <AlphaKind kKind, typename Power>
ADASPLASH2_HOST_DEVICE bool refine(const Entmax<kKind, Power>& entmax, const RowSums& sums, float& tau) {
  if (!(sums.prob > 1.0f)) return false;
  if constexpr (!std::is_same_v<Power, FastPower>) {
    const float step = entmax.newton_step(sums);
    tau += step;
    return step > kLargestLastPreciseRefinement * sums.prob / sums.weight;
  }
  const float step = entmax.newton_step(sums);
  tau = round_below(tau + step);
  return step > kLargestLastRefinement * sums.prob / sums.weight;  // f / A: the mean gap, by weight
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

}  // namespace adasplash2
