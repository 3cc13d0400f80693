// The moment histogram of one row's scores and the conservative solve for tau (docs/algorithm.md, section 3).
//
// The grid is absolute: bin = floor(kBinsPerUnit * z), kept modulo kNumSlots, so a climbing row maximum moves nothing;
// it only clears the slots that it enters. Each bin holds three integers relative to its own lower edge, with
// y = position inside the bin in [0, 1), quantised down to kQuantumBits bits:
//
//   count        n
//   sum          sum of q,                      q = floor(2^12 y)
//   sum_squares  sum of floor(q^2 / 2^12)
//
// Integers, because 32-bit integer atomics on shared memory are native (float and 64-bit ones are compare-and-swap
// loops) and because their sum does not depend on the order. All roundings are downwards: every coefficient of f in
// them is positive, so the root only moves left and tau_lower stays a lower bound.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/entmax.h"
#include "math/host_device.h"

namespace adasplash2 {

// A window (row_max - 1, row_max] then touches at most 32 bins, whatever its phase: no key of it is ever dropped.
constexpr int kBinsPerUnit = 31;
constexpr int kNumSlots = 32;
constexpr int kQuantumBits = 12;
constexpr int kQuanta = 1 << kQuantumBits;
constexpr int kBinWords = 3;

constexpr int64_t kMaxKeys = int64_t(1) << 20;
static_assert(kMaxKeys * (kQuanta - 1) < (int64_t(1) << 32), "sum and sum_squares of one bin must not overflow");

// NOTE: the fold t0 -> tau of the output pass is right to first order. A row whose tau may lie further than this
// fraction of its mean gap above tau_lower is refined first: with shift = n d / g, the neglected part of the row's
// probability is n d^2 = shift^2 g^2 / n <= shift^2 = 1e-3, and the output pass divides by what is left. The bound on d
// is loose by a factor of 2 to 20, so d^2 by 4 to 400: what remains is below the rounding of a 16-bit output.
constexpr float kMaxRelativeShift = 1.0f / 32.0f;

struct Bin {
  uint32_t count = 0;
  uint32_t sum = 0;
  uint32_t sum_squares = 0;
};

ADASPLASH2_HOST_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// floor(a * b + c) for an integer c, where the result is in [2^23, 2^24): a float's unit is 1 there, so the device's
// round-down FMA is this floor. On the host the product of two floats is exact in double.
ADASPLASH2_HOST_DEVICE float floor_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rd(a, b, c);
#else
  return static_cast<float>(std::floor(static_cast<double>(a) * b) + c);
#endif
}

// Maps the scores of one row to bins while row_max lies where it does. The slot of a score does not depend on it.
template <int kBits>  // of the position inside the bin
struct HistogramGridOf {
  static constexpr int kGridQuanta = 1 << kBits;
  // NOTE: the coarser the positions, the further a code reaches. A step of the reference is a multiple of kNumSlots
  // bins, of 8 kNumSlots for 9 bits: it changes no slot, and then not even the lower 8 bits of a bin.
  static constexpr int kReferenceStep = kNumSlots << (kQuantumBits - kBits);

  float score_to_quanta;
  float reference;  // a multiple of kReferenceStep near the row maximum of z
  float base;
  uint32_t top_bin;  // of the row maximum

  // base + quanta lies in the binade [2^23, 2^24), whose unit is 1: the mantissa of the sum is bin and q, no
  // conversion.
  static constexpr float kBinadeMiddle = 1.5f * (1 << 23);
  static constexpr uint32_t kReferenceBin = 0x4B400000u >> kBits;  // the bin whose lower edge is reference

  ADASPLASH2_HOST_DEVICE HistogramGridOf(float row_max, float score_to_z) {
    score_to_quanta = score_to_z * (kBinsPerUnit * kGridQuanta);
    reference = kReferenceStep * rintf(row_max * score_to_z * (1.0f / kReferenceStep));
    base = kBinadeMiddle - reference * (kBinsPerUnit * kGridQuanta);
    top_bin = bin_of(encode(row_max));
  }

  ADASPLASH2_HOST_DEVICE uint32_t encode(float score) const {
    return float_bits(floor_multiply_add(score, score_to_quanta, base));
  }
  ADASPLASH2_HOST_DEVICE static uint32_t bin_of(uint32_t code) { return code >> kBits; }
  ADASPLASH2_HOST_DEVICE static uint32_t quantum_of(uint32_t code) { return code & (kGridQuanta - 1); }
  ADASPLASH2_HOST_DEVICE static uint32_t slot_of(uint32_t bin) { return bin & (kNumSlots - 1); }

  // Below the window: its slot belongs to a bin above. Such a score is at or below row_max - 1, up to rounding.
  ADASPLASH2_HOST_DEVICE bool is_below_window(uint32_t bin) const {
    return static_cast<int32_t>(top_bin - bin) >= kNumSlots;
  }

  // How many slots, from the top bin downwards, still hold bins of an older window whose grid was `older`.
  ADASPLASH2_HOST_DEVICE int num_stale_slots(const HistogramGridOf& older) const {
    const float bins = (reference - older.reference) * kBinsPerUnit + static_cast<int32_t>(top_bin - older.top_bin);
    return bins < 0.0f ? 0 : bins < kNumSlots ? static_cast<int>(bins) : kNumSlots;
  }

  // z of a point `position` bins above the lower edge of `bin`.
  ADASPLASH2_HOST_DEVICE float z_at(uint32_t bin, float position) const {
    return reference + (static_cast<int32_t>(bin - kReferenceBin) + position) * (1.0f / kBinsPerUnit);
  }
};
using HistogramGrid = HistogramGridOf<kQuantumBits>;

// A bin in two words, for histograms that have to be small: q in 9 bits, and all of q^2. A bin takes kMaxPackedCount
// keys; who adds them has to see to it.
constexpr int kPackedQuantumBits = 9;
constexpr int kPackedBinWords = 2;
constexpr uint32_t kMaxPackedCount = (1 << 11) - 1;
static_assert(kMaxPackedCount * ((1 << kPackedQuantumBits) - 1) < 1 << 20, "the sum of q has 20 bits, the count 12");
using PackedHistogramGrid = HistogramGridOf<kPackedQuantumBits>;

struct PackedBin {
  uint32_t count_and_sum = 0;  // count << 20 | sum of q
  uint32_t sum_squares = 0;    // sum of q^2

  ADASPLASH2_HOST_DEVICE static PackedBin of(uint32_t quantum) { return {1u << 20 | quantum, quantum * quantum}; }
  ADASPLASH2_HOST_DEVICE Bin unpacked() const {
    constexpr int kShift = kQuantumBits - kPackedQuantumBits;
    // In the units of Bin: q^2 / 2^12 with q of 12 bits, rounded down.
    return {count_and_sum >> 20, (count_and_sum & 0xfffffu) << kShift, sum_squares >> (kQuantumBits - 2 * kShift)};
  }
};

// A lower bound for tau, in units of z, and how far below tau it can be.
struct TauBound {
  float tau_lower;
  float error;              // tau - tau_lower <= error
  float relative_shift;     // error in units of the mean gap
  float weight_sum = 0.0f;  // sum gap^(b - 1) at tau_lower of the keys as they entered the solve, whose f is 1 there

  ADASPLASH2_HOST_DEVICE bool needs_refinement() const { return relative_shift > kMaxRelativeShift; }
};

// Room for the rounding of the solve itself and of its result, which must not lift the bound above tau.
ADASPLASH2_HOST_DEVICE float round_below(float tau) { return tau - (fabsf(tau) * 0x1p-22f + 0x1p-20f); }

// alpha = 1.5. Going down from the top bin, the moments about the current lower edge give f there exactly. The bin in
// which f reaches 1 contains the root and enters as n copies of its mean: by Jensen's inequality that lowers f.
template <typename ReadBin>
ADASPLASH2_HOST_DEVICE TauBound solve_moments(const HistogramGrid& grid, ReadBin&& read_bin, float quantum) {
  constexpr float kTarget = kBinsPerUnit * kBinsPerUnit;  // f = 1 in units of the bin width
  constexpr float kUnit = 1.0f / kQuanta;
  float count = 0.0f, sum = 0.0f, squares = 0.0f;  // of the bins above, about the lower edge at hand
  float bin_count = 0.0f, bin_sum = 0.0f, bin_squares = 0.0f;
  uint32_t bin = grid.top_bin;
  for (int below = 0;; ++below, --bin) {
    const Bin words = read_bin(HistogramGrid::slot_of(bin));
    bin_count = static_cast<float>(words.count);
    bin_sum = static_cast<float>(words.sum) * kUnit;
    bin_squares = static_cast<float>(words.sum_squares) * kUnit;
    squares += 2.0f * sum + count;
    sum += count;
    if (squares + bin_squares >= kTarget || below == kNumSlots - 1) break;
    squares += bin_squares;
    sum += bin_sum;
    count += bin_count;
  }

  const auto smaller_root = [](float n, float first, float second) {
    const float excess = second - kTarget;
    return excess / (first + sqrtf(fmaxf(first * first - n * excess, 0.0f)));
  };
  const float mean = bin_count > 0.0f ? bin_sum / bin_count : 0.0f;
  const float all = count + bin_count, all_sum = sum + bin_sum;
  float position = smaller_root(all, all_sum, squares + bin_sum * mean);
  if (position > mean && count > 0.0f) position = smaller_root(count, sum, squares);
  position = fmaxf(position, 0.0f);

  // f(tau_lower) exceeds 1 by what the copies of the mean lack: at most the variance, and at most what follows from
  // [y - x]_+^2 <= (1 - x)^2 y^2; plus what quantisation hid. From there f falls with slope 2 g, where g(tau) >=
  // f(tau) / largest gap.
  const float largest_gap = static_cast<float>(grid.top_bin - bin) + 1.0f - position;
  const float copy_gap = fmaxf(mean - position, 0.0f), room = fmaxf(1.0f - position, 0.0f);
  const float lost = fminf(fmaxf(bin_squares - bin_sum * mean, 0.0f),
                           fmaxf(room * room * bin_squares - bin_count * copy_gap * copy_gap, 0.0f)) +
                     all * kUnit;
  const float gap_sum = all_sum - all * position;
  const float weight_sum = mean > position ? gap_sum : sum - count * position;
  const float coarse = lost * largest_gap / (2.0f * kTarget);
  const float slope = 2.0f * fmaxf(kTarget / largest_gap, gap_sum - all * coarse);
  const float error = fminf(lost / slope, 1.0f) + 2.0f * quantum;
  return {round_below(grid.z_at(bin, position)), error / kBinsPerUnit, error * all / gap_sum,
          weight_sum / kBinsPerUnit};
}

// Any alpha in (1, 2]: every bin enters as n copies of its mean (Jensen again), and Newton on the norm climbs from the
// left of the root of that sum, which it never passes.
template <AlphaKind kKind, typename ReadBin>
ADASPLASH2_HOST_DEVICE TauBound solve_means(const HistogramGrid& grid, const Entmax<kKind>& entmax, ReadBin&& read_bin,
                                            float quantum) {
  constexpr int kMaxSteps = 12;
  constexpr float kSmallestStep = 0x1p-16f;
  constexpr float kWidth = 1.0f / kBinsPerUnit;
  const uint32_t bottom_bin = grid.top_bin - (kNumSlots - 1);
  float tau = 0.0f;  // above the lower edge of the bottom bin, which is at or below row_max - 1
  for (int step = 0; step < kMaxSteps; ++step) {
    RowSums sums;
    for (int i = kNumSlots - 1; i >= 0; --i) {
      const Bin words = read_bin(HistogramGrid::slot_of(bottom_bin + i));
      if (words.count == 0) continue;
      const float count = static_cast<float>(words.count);
      const float gap = (i + static_cast<float>(words.sum) / (count * kQuanta)) * kWidth - tau;
      if (gap <= 0.0f) break;
      const float weight = entmax.weight(gap);
      sums.prob += count * entmax.prob(gap, weight);
      sums.weight += count * weight;
    }
    const float change = sums.weight > 0.0f ? entmax.newton_step(sums) : 0.0f;
    if (!(change > 0.0f)) break;
    tau += change;
    if (change < kSmallestStep) break;
  }

  // By convexity a bin adds at most what its keys add when pushed to its two edges with the mean kept; f falls from
  // that with slope b A, where A(tau) >= f(tau) / largest gap.
  float most = 0.0f, gap_sum = 0.0f, num_keys = 0.0f, weight_sum = 0.0f;
  for (int i = kNumSlots - 1; i >= 0 && (i + 1) * kWidth > tau; --i) {
    const Bin words = read_bin(HistogramGrid::slot_of(bottom_bin + i));
    if (words.count == 0) continue;
    const float count = static_cast<float>(words.count);
    const float mean = static_cast<float>(words.sum) / (count * kQuanta);
    const float low = fmaxf(i * kWidth - tau, 0.0f), high = (i + 1) * kWidth - tau;
    most +=
        count * ((1.0f - mean) * entmax.prob(low, entmax.weight(low)) + mean * entmax.prob(high, entmax.weight(high)));
    const float gap = fmaxf((i + mean) * kWidth - tau, 0.0f);
    gap_sum += count * gap;
    weight_sum += count * entmax.weight(gap);
    num_keys += count;
  }
  const float largest_gap = kNumSlots * kWidth - tau;
  const float lost = fmaxf(most - 1.0f, 0.0f);
  const float error = fminf(lost * largest_gap / entmax.exponent(), kWidth) + 2.0f * kWidth * quantum;
  return {round_below(grid.z_at(bottom_bin, tau * kBinsPerUnit)), error, error * num_keys / gap_sum, weight_sum};
}

// read_bin(slot) gives a Bin whose positions were floored to multiples of `quantum` of a bin.
template <AlphaKind kKind, typename ReadBin>
ADASPLASH2_HOST_DEVICE TauBound solve(const HistogramGrid& grid, const Entmax<kKind>& entmax, ReadBin&& read_bin,
                                      float quantum = 1.0f / kQuanta) {
  if constexpr (kKind == AlphaKind::kOneAndHalf) return solve_moments(grid, read_bin, quantum);
  return solve_means(grid, entmax, read_bin, quantum);
}

}  // namespace adasplash2
