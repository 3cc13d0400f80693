// entmax of as many slices as a vector has lanes, a lane per slice: (length, lanes) in scratch memory.
//
// For columns of (length, inner), which are next to each other anyway, and for rows too short to be worth a reduction
// over lanes, which are transposed on the way. The algorithm is that of entmax_row.h.
#pragma once

#include "cpu/entmax_common.h"
#include "cpu/tasks.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {
namespace entmax_slices {

template <class Element>
ADASPLASH2_INLINE Vector<Accumulator<Element>> load_first(const Element* p, int64_t count) {
  Element padded[kLanes<Accumulator<Element>>] = {};
  std::memcpy(padded, p, count * sizeof(Element));
  return load(padded);
}

template <class Element>
ADASPLASH2_INLINE void store_first(Element* p, Vector<Accumulator<Element>> v, int64_t count) {
  Element padded[kLanes<Accumulator<Element>>];
  store(padded, v);
  std::memcpy(p, padded, count * sizeof(Element));
}

// Kahan's sum, lane by lane.
template <class Real>
struct CarefulSum {
  Vector<Real> total = {};
  Vector<Real> lost = {};

  ADASPLASH2_INLINE void add(Vector<Real> part) {
    const Vector<Real> corrected = part - lost, sum = total + corrected;
    lost = (sum - total) - corrected;
    total = sum;
  }
};

// `width` slices of a (outer, length, inner) tensor that are neighbours: columns if inner > 1, rows otherwise.
struct Neighbours {
  int64_t length;
  int64_t inner;
  int64_t width;
  int64_t readable;  // elements from the first slice's first to the tensor's end

  template <class Element, class Real = Accumulator<Element>>
  void read(const Element* tensor, Real* lanes) const {
    constexpr int64_t kLane = kLanes<Real>;
    if (inner > 1) {
      for (int64_t j = 0; j < length; ++j) {
        const Element* p = tensor + j * inner;
        store(lanes + j * kLane, width == kLane ? load(p) : load_first(p, width));
      }
      return;
    }
    for_each_tile<kLane>([&](int64_t begin, int64_t size) {
      Vector<Real> tile[kLane];
      for (int64_t w = 0; w < kLane; ++w) {
        const int64_t offset = w * length + begin;  // what is read past the row's end is dropped below
        if (w >= width) tile[w] = Vector<Real>{};
        else
          tile[w] = offset + kLane <= readable ? load(tensor + offset) : load_first(tensor + offset, readable - offset);
      }
      transpose<Real>(tile);
      for (int64_t j = 0; j < size; ++j) store(lanes + (begin + j) * kLane, tile[j]);
    });
  }

  template <class Element, class Real = Accumulator<Element>>
  void write(const Real* lanes, Element* tensor) const {
    constexpr int64_t kLane = kLanes<Real>;
    if (inner > 1) {
      for (int64_t j = 0; j < length; ++j) {
        const Vector<Real> v = load(lanes + j * kLane);
        if (width == kLane) store(tensor + j * inner, v);
        else store_first(tensor + j * inner, v, width);
      }
      return;
    }
    for_each_tile<kLane>([&](int64_t begin, int64_t size) {
      Vector<Real> tile[kLane];
      for (int64_t j = 0; j < kLane; ++j) tile[j] = j < size ? load(lanes + (begin + j) * kLane) : Vector<Real>{};
      transpose<Real>(tile);
      for (int64_t w = 0; w < width; ++w) {
        const int64_t offset =
            w * length + begin;  // what is written past the row's end is written again by the next row
        if (offset + kLane <= width * length) store(tensor + offset, tile[w]);
        else store_first(tensor + offset, tile[w], size);
      }
    });
  }

 private:
  // The last of several tiles ends with the rows, so it may repeat keys of the one before.
  template <int64_t kLane, class Function>
  ADASPLASH2_INLINE void for_each_tile(Function function) const {
    for (int64_t j = 0; j < length; j += kLane) {
      const int64_t begin = std::max<int64_t>(0, std::min(j, length - kLane));
      function(begin, std::min(kLane, length));
    }
  }
};

template <class Real>
class ForwardLanes {
  static constexpr int kLane = kLanes<Real>;

 public:
  explicit ForwardLanes(int64_t length)
      : keys_(length * kLane), group_max_((num_groups(length) + 1) * kLane), list_((length + 1) * kLane) {}

  Real* keys() { return keys_.data(); }

  // keys() becomes prob; the algorithm is that of ForwardRow, a lane per slice.
  void run(int64_t length, double alpha) {
    with_power(alpha, [&](auto exponent) { run_power<exponent>(length, alpha); });
  }

 private:
  struct Roots {
    Vector<Real> lower, step;  // tau = lower + step
  };

  static int64_t num_groups(int64_t length) { return (length + kGroupVectors - 1) / kGroupVectors; }

  template <Exponent kExponent>
  void run_power(int64_t length, double alpha) {
    const Power<Real, kExponent> power(alpha);
    const Real unit = static_cast<Real>(alpha - 1.0);
    const Vector<Real> zero = {}, infinity = broadcast(kInfinity<Real>);
    const auto [row_max, row_sum] = find_maxima(length);
    Vector<Real> special = zero;  // what prob is where there is no root
    for (int lane = 0; lane < kLane; ++lane) {
      if (row_max[lane] == kInfinity<Real> || (row_sum[lane] != row_sum[lane] && has_nan(length, lane))) {
        special[lane] = std::numeric_limits<Real>::quiet_NaN();
      }
    }
    const auto is_regular = (special == special) & (row_max > -infinity);
    const Vector<Real> origin = is_regular ? row_max : zero;

    Vector<Real> lower = broadcast(round_down<Real>(-1.0 / (alpha - 1.0)));
    const int64_t groups = num_groups(length);
    for (int64_t g = 0; g < groups; ++g) store(&group_max_[g * kLane], load(&group_max_[g * kLane]) - origin);
    if (groups > 1) {
      store(&group_max_[groups * kLane], -infinity);  // lists come in pairs of vectors
      lower = climb(power, group_max_.data(), round_up(groups, 2), lower, unit, kRoughTolerance).lower;
    }
    const int64_t size = collect(length, origin, lower);
    const Roots roots = climb(power, list_.data(), size, lower, unit, final_tolerance<Real, kExponent>());

    // origin + lower = threshold + rounding, exactly; see ForwardRow::solve_and_write.
    const Vector<Real> threshold = origin + roots.lower, moved = threshold - origin;
    const Vector<Real> rounding = (origin - (threshold - moved)) + (roots.lower - moved);
    const Vector<Real> left_over = (rounding + roots.step) * -unit;
    for (int64_t g = 0; g < groups; ++g) {
      const bool is_live = any_above<Real>(load(&group_max_[g * kLane]), roots.lower);
      const int64_t end = std::min(length, (g + 1) * kGroupVectors);
      for (int64_t j = g * kGroupVectors; j < end; ++j) {
        Vector<Real> prob = zero;
        if (is_live) prob = prob_of(power, (load(&keys_[j * kLane]) - threshold) * unit + left_over);
        store(&keys_[j * kLane], is_regular ? prob : special);
      }
    }
  }

  struct Maxima {
    Vector<Real> max, sum;
  };

  Maxima find_maxima(int64_t length) {
    Vector<Real> row_max = broadcast(-kInfinity<Real>), row_sum = {};
    for (int64_t begin = 0; begin < length; begin += kGroupVectors) {
      const int64_t end = std::min(length, begin + kGroupVectors);
      Vector<Real> group_max = broadcast(-kInfinity<Real>), group_sum = {};
      for (int64_t j = begin; j < end; ++j) {
        const Vector<Real> v = load(&keys_[j * kLane]);
        group_max = max<Real>(v, group_max);
        group_sum += v;
      }
      store(&group_max_[begin / kGroupVectors * kLane], group_max);
      row_max = max<Real>(group_max, row_max);
      row_sum += group_sum;
    }
    return {row_max, row_sum};
  }

  bool has_nan(int64_t length, int lane) const {
    for (int64_t j = 0; j < length; ++j) {
      if (std::isnan(keys_[j * kLane + lane])) return true;
    }
    return false;
  }

  // list_ = keys - origin, of those keys that are above `lower` in any lane; returns how many, made even.
  int64_t collect(int64_t length, Vector<Real> origin, Vector<Real> lower) {
    int64_t size = 0;
    for (int64_t begin = 0; begin < length; begin += kGroupVectors) {
      if (!any_above<Real>(load(&group_max_[begin / kGroupVectors * kLane]), lower)) continue;
      const int64_t end = std::min(length, begin + kGroupVectors);
      for (int64_t j = begin; j < end; ++j) {
        const Vector<Real> shifted = load(&keys_[j * kLane]) - origin;
        store(&list_[size * kLane], shifted);
        size += any_above<Real>(shifted, lower);
      }
    }
    store(&list_[size * kLane], broadcast(-kInfinity<Real>));
    return round_up(size, 2);
  }

  // As in entmax_row.h; a lane that has arrived waits for the others.
  template <Exponent kExponent>
  static Roots climb(const Power<Real, kExponent>& power, const Real* list, int64_t size, Vector<Real> t, Real unit,
                     double tolerance) {
    const Vector<Real> zero = {}, enough = broadcast(static_cast<Real>(1.0 + tolerance));
    Vector<Real> step = zero;
    for (int iteration = 0; iteration < kMostSteps; ++iteration) {
      CarefulSum<Real> prob_sum, weight_sum;
      for (int64_t begin = 0; begin < size; begin += kFlushVectors) {
        const int64_t end = std::min(size, begin + kFlushVectors);
        Vector<Real> prob[2] = {}, weight[2] = {};
        for (int64_t j = begin; j < end; j += 2) {
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const Vector<Real> difference = max<Real>(load(list + (j + i) * kLane) - t, zero);
            if constexpr (kExponent == Exponent::kGeneral) {
              if (!any_above<Real>(difference, zero)) continue;
            }
            const Vector<Real> gap = difference * unit, w = power.weight(gap);
            prob[i] += w * gap;
            weight[i] += w;
          }
        }
        prob_sum.add(prob[0] + prob[1]);
        weight_sum.add(weight[0] + weight[1]);
      }
      const Vector<Real> prob = prob_sum.total, weight = weight_sum.total;
      step = (prob - norm_of<Real, kExponent>(prob, unit)) / (weight * unit);
      const Vector<Real> next = t + step;
      const Vector<Real> moved = (prob > enough) & (next > t) ? next : t;
      if (!any_above<Real>(moved, t)) break;
      t = moved;
    }
    return {t, step};
  }

  Buffer<Real> keys_, group_max_, list_;  // (length, lanes), (groups of keys, lanes), (at most length, lanes)
};

template <class Real>
class BackwardLanes {
  static constexpr int kLane = kLanes<Real>;

 public:
  explicit BackwardLanes(int64_t length) : prob_(length * kLane), grad_(length * kLane) {}

  Real* prob() { return prob_.data(); }
  Real* grad() { return grad_.data(); }

  // grad() becomes the gradient of x, prob() is lost; grad_alpha (width,) is nullable.
  void run(int64_t length, double alpha, double* grad_alpha, int64_t width) {
    with_power(alpha, [&](auto exponent) {
      if (grad_alpha != nullptr) run_power<exponent, true>(length, alpha, grad_alpha, width);
      else run_power<exponent, false>(length, alpha, grad_alpha, width);
    });
  }

 private:
  template <Exponent kExponent, bool kWantAlpha>
  void run_power(int64_t length, double alpha, double* grad_alpha, int64_t width) {
    const Real exponent = static_cast<Real>(2.0 - alpha);
    const Vector<Real> zero = {};
    const Vector<Real> first = load(prob_.data());
    CarefulSum<Real> weight_sum, weight_grad, prob_grad, entropy_sum, entropy_grad;
    for (int64_t begin = 0; begin < length; begin += kFlushVectors) {
      const int64_t end = std::min(length, begin + kFlushVectors);
      Vector<Real> weight_part = {}, weight_grad_part = {}, prob_grad_part = {}, entropy_part = {},
                   entropy_grad_part = {};
      for (int64_t j = begin; j < end; ++j) {
        const Vector<Real> p = load(&prob_[j * kLane]);
        const auto in_support = p > zero;
        const Vector<Real> grad = in_support ? load(&grad_[j * kLane]) : zero;
        const Vector<Real> weight = in_support ? weight_of<Real, kExponent>(p, exponent) : zero;
        store(&grad_[j * kLane], grad);
        store(&prob_[j * kLane], weight);
        weight_part += weight;
        weight_grad_part += weight * grad;
        if constexpr (kWantAlpha) {
          const Vector<Real> entropy = in_support ? p * log2_positive<Real>(p) * -kLn2<Real> : zero;
          prob_grad_part += p * grad;
          entropy_part += entropy;
          entropy_grad_part += entropy * grad;
        }
      }
      weight_sum.add(weight_part);
      weight_grad.add(weight_grad_part);
      prob_grad.add(prob_grad_part);
      entropy_sum.add(entropy_part);
      entropy_grad.add(entropy_grad_part);
    }
    const auto is_nan = first != first;  // a slice of NaN, which has no support
    const Vector<Real> mean = weight_grad.total / (weight_sum.total > zero ? weight_sum.total : broadcast(Real(1)));
    const Vector<Real> delta = is_nan ? first : mean;
    for (int64_t j = 0; j < length; ++j) {
      const Vector<Real> weight = load(&prob_[j * kLane]);
      const Vector<Real> grad = weight * (load(&grad_[j * kLane]) - delta);
      store(&grad_[j * kLane], (weight > zero) | is_nan ? grad : zero);
    }
    if constexpr (kWantAlpha) {
      for (int64_t w = 0; w < width; ++w) {
        grad_alpha[w] =
            alpha_gradient(prob_grad.total[w], delta[w], entropy_grad.total[w], entropy_sum.total[w], alpha);
      }
    }
  }

  Buffer<Real> prob_, grad_;  // (length, lanes)
};

}  // namespace entmax_slices
}  // namespace adasplash2::cpu::ADASPLASH2_ISA
