// alpha-entmax over one dimension of a tensor: prob from x, and the gradients of x and alpha from the saved prob.
//
// Tensors are dense, (outer, length, inner) in memory, and entmax runs along `length`: outer * inner slices. Long rows
// go one at a time (entmax_row.h), columns and short rows many at once (entmax_lanes.h). The memory traffic is that of
// reading x and writing prob once, as long as what a thread works on fits into the second-level cache. Deterministic:
// the arithmetic of a slice does not depend on the thread that does it.
#pragma once

#include "cpu/entmax_lanes.h"
#include "cpu/entmax_row.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {
namespace entmax_slices {

constexpr int64_t kTaskElements = 1 << 14;  // a task costs some microseconds, far more than handing it out
inline double alpha_of(const EntmaxProblem& problem, int64_t slice) {
  return problem.alpha_slices == nullptr ? problem.alpha : problem.alpha_slices[slice];
}

// Long rows: make_worker() returns a callable worker(slice), kTaskElements at a time.
template <class MakeWorker>
void for_each_row(const EntmaxProblem& problem, const Parallel& parallel, MakeWorker make_worker) {
  const int64_t rows_per_task = std::max<int64_t>(1, kTaskElements / problem.length);
  run_tasks(parallel, (problem.outer + rows_per_task - 1) / rows_per_task, [&] {
    return [&, worker = make_worker()](int64_t task) mutable {
      const int64_t end = std::min(problem.outer, (task + 1) * rows_per_task);
      for (int64_t slice = task * rows_per_task; slice < end; ++slice) worker(slice);
    };
  });
}

// Columns and short rows: make_worker() returns a callable worker(neighbours, offset of their first key, first slice)
// for up to `lanes` neighbouring slices of one alpha.
template <class MakeWorker>
void for_each_neighbours(const EntmaxProblem& problem, int64_t lanes, const Parallel& parallel,
                         MakeWorker make_worker) {
  const int64_t line = problem.inner > 1 ? problem.inner : problem.outer;  // neighbouring slices
  const int64_t num_lines = problem.inner > 1 ? problem.outer : 1;
  const int64_t slice_stride = problem.inner > 1 ? 1 : problem.length;
  const int64_t blocks_per_line = (line + lanes - 1) / lanes, num_blocks = num_lines * blocks_per_line;
  const int64_t blocks_per_task = std::max<int64_t>(1, kTaskElements / (problem.length * std::min(lanes, line)));
  run_tasks(parallel, (num_blocks + blocks_per_task - 1) / blocks_per_task, [&] {
    return [&, worker = make_worker()](int64_t task) mutable {
      const int64_t end = std::min(num_blocks, (task + 1) * blocks_per_task);
      for (int64_t block = task * blocks_per_task; block < end; ++block) {
        const int64_t first_of_line = block / blocks_per_line * line, line_end = first_of_line + line;
        int64_t slice = first_of_line + block % blocks_per_line * lanes;
        const int64_t block_end = std::min(line_end, slice + lanes);
        while (slice < block_end) {
          int64_t width = 1;
          while (slice + width < block_end && alpha_of(problem, slice + width) == alpha_of(problem, slice)) ++width;
          const int64_t offset =
              block / blocks_per_line * line * problem.length + (slice - first_of_line) * slice_stride;
          const int64_t num_elements = problem.outer * problem.length * problem.inner;
          worker(Neighbours{problem.length, problem.inner, width, num_elements - offset}, offset, slice);
          slice += width;
        }
      }
    };
  });
}

// Rows up to this length go many at once.
constexpr int64_t kShortRow = 128;

template <class Element>
void forward(const EntmaxForward& params, const Parallel& parallel) {
  using Real = Accumulator<Element>;
  const auto* x = static_cast<const Element*>(params.x);
  auto* prob = static_cast<Element*>(params.prob);
  if (params.inner == 1 && params.length > kShortRow) {
    for_each_row(params, parallel, [&] {
      return [&, worker = ForwardRow<Element>(params.length)](int64_t slice) mutable {
        const int64_t offset = slice * params.length;
        worker.run(x + offset, prob + offset, params.length, alpha_of(params, slice));
      };
    });
    return;
  }
  for_each_neighbours(params, kLanes<Real>, parallel, [&] {
    return [&, lanes = ForwardLanes<Real>(params.length)](const Neighbours& neighbours, int64_t offset,
                                                          int64_t slice) mutable {
      neighbours.read(x + offset, lanes.keys());
      lanes.run(params.length, alpha_of(params, slice));
      neighbours.write(lanes.keys(), prob + offset);
    };
  });
}

template <class Element>
void backward(const EntmaxBackward& params, const Parallel& parallel) {
  using Real = Accumulator<Element>;
  const auto* prob = static_cast<const Element*>(params.prob);
  const auto* grad_prob = static_cast<const Element*>(params.grad_prob);
  auto* grad_x = static_cast<Element*>(params.grad_x);
  const auto grad_alpha = [&](int64_t slice) {
    return params.grad_alpha == nullptr ? nullptr : params.grad_alpha + slice;
  };
  if (params.inner == 1 && params.length > kShortRow) {
    for_each_row(params, parallel, [&] {
      return [&, worker = BackwardRow<Element>(params.length)](int64_t slice) mutable {
        const int64_t offset = slice * params.length;
        worker.run(prob + offset, grad_prob + offset, grad_x == nullptr ? nullptr : grad_x + offset, grad_alpha(slice),
                   params.length, alpha_of(params, slice));
      };
    });
    return;
  }
  for_each_neighbours(params, kLanes<Real>, parallel, [&] {
    return [&, lanes = BackwardLanes<Real>(params.length)](const Neighbours& neighbours, int64_t offset,
                                                           int64_t slice) mutable {
      neighbours.read(prob + offset, lanes.prob());
      neighbours.read(grad_prob + offset, lanes.grad());
      lanes.run(params.length, alpha_of(params, slice), grad_alpha(slice), neighbours.width);
      if (grad_x != nullptr) neighbours.write(lanes.grad(), grad_x + offset);
    };
  });
}

template <class Function>
void with_element(DataType dtype, Function function) {
  switch (dtype) {
    case DataType::kFloat32:
      return function(float());
    case DataType::kBFloat16:
      return function(BFloat16());
    case DataType::kFloat16:
      return function(Float16());
    case DataType::kFloat64:
      return function(double());
    case DataType::kBool:
      break;
  }
  throw std::invalid_argument("adasplash2: entmax needs a floating point tensor");
}

}  // namespace entmax_slices

void entmax_forward(const EntmaxForward& params, const Parallel& parallel) {
  entmax_slices::with_element(params.dtype,
                              [&](auto element) { entmax_slices::forward<decltype(element)>(params, parallel); });
}

void entmax_backward(const EntmaxBackward& params, const Parallel& parallel) {
  entmax_slices::with_element(params.dtype,
                              [&](auto element) { entmax_slices::backward<decltype(element)>(params, parallel); });
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
