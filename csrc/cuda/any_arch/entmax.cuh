// entmax along the middle dimension of dense (outer, length, inner) tensors, on the histogram of the attention scan.
//
//   forward    in x            out prob
//   backward   in prob, dprob  out dx = weight (dprob - delta), dalpha (outer, inner), one number a slice
//
// A slice is `length` keys, `inner` elements apart. A block takes a few neighbouring slices at a time and a team of its
// threads each; neighbouring threads read neighbouring elements: keys of one slice where inner is 1, the same key of
// neighbouring slices otherwise. Passes over a slice, which stays in the caches: maximum, histogram, two or three exact
// sums, writing; backward: sums, writing. Sums are added up in an order that depends on shapes alone.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <dynamic_smem.cuh>
#include <type_traits>

#include "adasplash2.h"
#include "math/entmax.h"
#include "math/histogram.h"

namespace adasplash2::cuda {

constexpr int kEntmaxThreads = 256;
// NOTE: 64 registers a thread. Left to itself ptxas aims for 32 in the backward kernels, and spills.
constexpr int kEntmaxBlocksPerSm = 4;
constexpr int kMostSlices = 32;  // a block takes at a time: a warp then reads 32 neighbouring elements

template <typename Element>
using EntmaxReal = std::conditional_t<std::is_same_v<Element, double>, double, float>;

// How a block's threads share its slices. Both numbers are powers of two, their product is kEntmaxThreads.
struct SliceTeams {
  int num_slices;   // at a time
  int num_members;  // threads of a slice

  static SliceTeams of(const EntmaxProblem& problem) {
    constexpr int kKeysPerMember = 4;
    constexpr int kFewestMembers = kEntmaxThreads / kMostSlices;
    int members = kFewestMembers;
    if (problem.inner == 1) {
      while (members < kEntmaxThreads && members * kKeysPerMember < problem.length) members *= 2;
    } else {
      while (members < kEntmaxThreads && kEntmaxThreads / members / 2 >= problem.inner) members *= 2;
    }
    return {kEntmaxThreads / members, members};
  }
};

struct EntmaxForwardParams {
  EntmaxForward call;
  SliceTeams teams;
};
struct EntmaxBackwardParams {
  EntmaxBackward call;
  SliceTeams teams;
};

// What one thread knows of its place and of the slice at hand.
struct SliceWorker {
  int64_t length, stride;  // keys, and elements from one to the next
  int64_t inner, outer, groups_per_line;
  int num_slices, num_members;
  int slice, member;  // of the block, of the slice
  int member_stride;  // threads from one member of a team to the next
  int64_t index;      // of the slice in all, -1 where there is none
  int64_t begin;      // element offset of its first key

  __device__ __forceinline__ SliceWorker(const EntmaxProblem& problem, const SliceTeams& teams)
      : length(problem.length),
        stride(problem.inner),
        num_slices(teams.num_slices),
        num_members(teams.num_members),
        index(-1),
        begin(0) {
    const int thread = threadIdx.x;
    const bool is_row = problem.inner == 1;
    slice = is_row ? thread / num_members : thread % num_slices;
    member = is_row ? thread % num_members : thread / num_slices;
    member_stride = is_row ? 1 : num_slices;
    // Neighbouring slices: a line is all of them where keys are contiguous, `inner` of them otherwise.
    inner = is_row ? problem.outer : problem.inner;
    outer = is_row ? 1 : problem.outer;
    groups_per_line = (inner + num_slices - 1) / num_slices;
  }

  __device__ __forceinline__ int64_t num_groups() const { return outer * groups_per_line; }

  __device__ __forceinline__ void go_to(int64_t group) {
    const int64_t line = group / groups_per_line, column = group % groups_per_line * num_slices + slice;
    index = column < inner ? line * inner + column : -1;
    begin = stride == 1 ? column * length : line * length * inner + column;
  }

  // body(offset) for this thread's keys.
  template <typename Body>
  __device__ __forceinline__ void for_each_key(const Body& body) const {
    if (index < 0) return;
    for (int64_t key = member; key < length; key += num_members) body(begin + key * stride);
  }

  // Combines the members' values in a fixed order; every member gets the result. The whole block.
  template <typename Value, typename Combine>
  __device__ __forceinline__ Value reduce(Value* s_values, const Value& value, const Combine& combine) const {
    const int thread = threadIdx.x;
    s_values[thread] = value;
    for (int distance = num_members / 2; distance > 0; distance /= 2) {
      __syncthreads();
      if (member < distance) {
        s_values[thread] = combine(s_values[thread], s_values[thread + distance * member_stride]);
      }
    }
    __syncthreads();
    const Value result = s_values[thread - member * member_stride];
    __syncthreads();
    return result;
  }
};

__device__ __forceinline__ double slice_alpha(const EntmaxProblem& problem, int64_t slice) {
  return problem.alpha_slices == nullptr || slice < 0 ? problem.alpha : problem.alpha_slices[slice];
}

// ---- forward

constexpr int kSliceWords = kNumSlots * kBinWords + 1;  // odd: neighbouring slices start in different banks

template <typename Real>
struct EntmaxForwardSmem {
  RowSumsOf<Real> sums[kEntmaxThreads];
  uint32_t histogram[kMostSlices][kSliceWords];
  float tau_lower[kMostSlices];
  int is_climbing;
};

// What may be left of sum prob - 1 before the last step of Newton, which squares it where sum prob is smooth. For
// larger alpha keys that leave the support on the way bend it.
template <typename Real, AlphaKind kKind>
ADASPLASH2_HOST_DEVICE constexpr Real largest_excess() {
  constexpr bool is_double = std::is_same_v<Real, double>;
  if (kKind == AlphaKind::kOneAndHalf) return is_double ? Real(1e-9) : Real(3e-5);
  return is_double ? Real(0x1p-49) : Real(0x1p-20);
}
constexpr int kMostClimbs = 50;  // 1 to 3 are usual: a guard against what nobody thought of

template <typename Element, AlphaKind kKind>
__global__ void __launch_bounds__(kEntmaxThreads, kEntmaxBlocksPerSm)
    entmax_forward_kernel(const EntmaxForwardParams params) {
  using Real = EntmaxReal<Element>;
  const EntmaxForward& call = params.call;
  const Element* g_x = static_cast<const Element*>(call.x);
  Element* g_prob = static_cast<Element*>(call.prob);
  EntmaxForwardSmem<Real>& smem = *reinterpret_cast<EntmaxForwardSmem<Real>*>(dynamic_smem());
  const Real infinity = INFINITY;

  SliceWorker worker(call, params.teams);
  for (int64_t group = blockIdx.x; group < worker.num_groups(); group += gridDim.x) {
    worker.go_to(group);
    const double alpha = slice_alpha(call, worker.index);
    const Entmax<kKind, PrecisePower<Real>> entmax{static_cast<Real>(alpha)};
    const Real unit = static_cast<Real>(alpha - 1.0);

    // Phase 1: the slice's maximum. NaN counts as +inf: such a slice has no tau.
    Real largest = -infinity;
    worker.for_each_key([&](int64_t at) {
      const Real x = static_cast<Real>(g_x[at]);
      largest = x < infinity ? std::fmax(largest, x) : infinity;
    });
    largest =
        worker.reduce(reinterpret_cast<Real*>(smem.sums), largest, [](Real a, Real b) { return std::fmax(a, b); });
    const bool has_tau = std::fabs(largest) < infinity;

    // Phase 2: the histogram of z - max z, and a lower bound of tau from it. Longer slices might overflow a bin.
    const bool has_histogram = worker.length <= kMaxKeys;
    const HistogramGrid grid(0.0f, static_cast<float>(unit));
    if (has_histogram) {
      const int num_words = worker.num_slices * kSliceWords;
      for (int i = threadIdx.x; i < num_words; i += kEntmaxThreads) smem.histogram[0][i] = 0;
      __syncthreads();
      worker.for_each_key([&](int64_t at) {
        const Real shifted = static_cast<Real>(g_x[at]) - largest;
        if (!(has_tau && shifted * unit > -1)) return;
        const uint32_t code = grid.encode(static_cast<float>(shifted));
        const uint32_t bin = HistogramGrid::bin_of(code), quantum = HistogramGrid::quantum_of(code);
        if (grid.is_below_window(bin)) return;
        uint32_t* s_bin = smem.histogram[worker.slice] + HistogramGrid::slot_of(bin) * kBinWords;
        atomicAdd(s_bin, 1u);
        atomicAdd(s_bin + 1, quantum);
        atomicAdd(s_bin + 2, quantum * quantum >> kQuantumBits);
      });
    }
    __syncthreads();
    if (worker.member == 0) {
      float tau_lower = -1.0f;
      if (has_histogram && has_tau && worker.index >= 0) {
        const uint32_t* s_row = smem.histogram[worker.slice];
        const TauBound bound = solve(grid, Entmax<kKind>{static_cast<float>(alpha)}, [s_row](uint32_t slot) {
          const uint32_t* s_bin = s_row + slot * kBinWords;
          return Bin{s_bin[0], s_bin[1], s_bin[2]};
        });
        tau_lower = fmaxf(tau_lower, bound.tau_lower);
      }
      smem.tau_lower[worker.slice] = tau_lower;
    }
    __syncthreads();

    // Phase 3: exact sums carry tau - max z to the root, by Newton on the norm. A slice that is there waits for others.
    Real tau = smem.tau_lower[worker.slice];
    bool is_climbing = has_tau && worker.index >= 0;
    const auto gap_of = [&](Real x) { return std::fmax((x - largest) * unit - tau, Real(0)); };
    for (int climb = 0; climb < kMostClimbs; ++climb) {
      if (threadIdx.x == 0) smem.is_climbing = 0;
      RowSumsOf<Real> sums;
      if (is_climbing) {
        worker.for_each_key([&](int64_t at) {
          const Real gap = gap_of(static_cast<Real>(g_x[at]));
          if (!(gap > 0)) return;
          const Real weight = entmax.weight(gap);
          sums.prob += entmax.prob(gap, weight);
          sums.weight += weight;
        });
      }
      sums = worker.reduce(smem.sums, sums, [](const RowSumsOf<Real>& a, const RowSumsOf<Real>& b) {
        return RowSumsOf<Real>{a.prob + b.prob, a.weight + b.weight, 0};
      });
      if (is_climbing && sums.weight > 0) {
        const Real next = tau + entmax.newton_step(sums);
        is_climbing = sums.prob - 1 > largest_excess<Real, kKind>() && next > tau;
        tau = next;
      }
      if (is_climbing && worker.member == 0) atomicOr(reinterpret_cast<unsigned*>(&smem.is_climbing), 1u);
      __syncthreads();
      const bool goes_on = smem.is_climbing != 0;
      __syncthreads();
      if (!goes_on) break;
    }

    // Phase 4: prob.
    const Real fill = largest == -infinity ? Real(0) : static_cast<Real>(NAN);
    worker.for_each_key([&](int64_t at) {
      const Real gap = gap_of(static_cast<Real>(g_x[at]));
      const Real prob = has_tau ? entmax.prob(gap, entmax.weight(gap)) : fill;
      g_prob[at] = static_cast<Element>(prob);
    });
  }
}

// ---- backward

template <typename Element, AlphaKind kKind>
__global__ void __launch_bounds__(kEntmaxThreads, kEntmaxBlocksPerSm)
    entmax_backward_kernel(const EntmaxBackwardParams params) {
  using Real = EntmaxReal<Element>;
  const EntmaxBackward& call = params.call;
  const Element* g_prob = static_cast<const Element*>(call.prob);
  const Element* g_grad_prob = static_cast<const Element*>(call.grad_prob);
  Element* g_grad_x = static_cast<Element*>(call.grad_x);
  GradSums<Real>* s_sums = reinterpret_cast<GradSums<Real>*>(dynamic_smem());

  SliceWorker worker(call, params.teams);
  for (int64_t group = blockIdx.x; group < worker.num_groups(); group += gridDim.x) {
    worker.go_to(group);
    const double alpha = slice_alpha(call, worker.index);
    const Entmax<kKind, PrecisePower<Real>> entmax{static_cast<Real>(alpha)};

    // Phase 1: sums. A prob of exactly zero passes nothing on; a slice of NaN makes its sums NaN.
    GradSums<Real> sums{};
    worker.for_each_key([&](int64_t at) {
      const Real prob = static_cast<Real>(g_prob[at]);
      if (prob == 0) return;
      const Real weight = entmax.weight_of_prob(prob), grad = static_cast<Real>(g_grad_prob[at]);
      sums.add(prob, weight, grad, call.grad_alpha == nullptr ? Real(0) : -prob * std::log(prob));
    });
    sums = worker.reduce(s_sums, sums, [](const GradSums<Real>& a, const GradSums<Real>& b) {
      return GradSums<Real>{a.weight + b.weight, a.weight_grad + b.weight_grad, a.prob_grad + b.prob_grad,
                            a.entropy + b.entropy, a.entropy_grad + b.entropy_grad};
    });
    const Real delta = sums.delta();

    // Phase 2: the gradients.
    if (call.grad_alpha != nullptr && worker.member == 0 && worker.index >= 0) {
      call.grad_alpha[worker.index] = sums.by_alpha(static_cast<Real>(alpha));
    }
    if (g_grad_x == nullptr) continue;
    worker.for_each_key([&](int64_t at) {
      const Real prob = static_cast<Real>(g_prob[at]);
      const Real grad =
          prob == 0 ? Real(0) : entmax.weight_of_prob(prob) * (static_cast<Real>(g_grad_prob[at]) - delta);
      g_grad_x[at] = static_cast<Element>(grad);
    });
  }
}

}  // namespace adasplash2::cuda
