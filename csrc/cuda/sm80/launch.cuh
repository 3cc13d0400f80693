// The passes of one instance.
#pragma once

#include <cuda_runtime.h>

#include <launch_kernel.cuh>
#include <type_traits>

#include "cuda/any_arch/delta.cuh"
#include "cuda/any_arch/row_sum.cuh"
#include "cuda/any_arch/slab_sum.cuh"
#include "cuda/any_arch/split_floats.cuh"
#include "cuda/config.h"
#include "cuda/launch_pass.cuh"
#include "cuda/passes.h"
#include "cuda/sm80/grad_alpha.cuh"
#include "cuda/sm80/grad_key_value.cuh"
#include "cuda/sm80/grad_mask.cuh"
#include "cuda/sm80/grad_query.cuh"
#include "cuda/sm80/output.cuh"
#include "cuda/sm80/scan.cuh"
#include "math/work_range.h"

namespace adasplash2::cuda::sm80 {

template <typename Element, int kHeadDim>
struct Instance {
  static constexpr int kCols = kTileCols<Element, kHeadDim>;

  template <typename Config, typename Params>
  static void launch(void (*kernel)(Params), dim3 grid, void* stream, const Params& params) {
    static_assert(Config::kSmemBytes <= kMostSmemBytes, "every GPU must have room for a block");
    launch_kernel(kernel, grid, dim3(Config::kThreads), Config::kSmemBytes, stream_of(stream), params);
  }

  // f(std::bool_constant) for whether there is a mask.
  template <typename Function>
  static void for_mask(const AttentionProblem& problem, const Function& f) {
    if (problem.mask.data == nullptr) {
      f(std::false_type());
    } else {
      f(std::true_type());
    }
  }

  static void scan(const Forward& call, const ForwardWorkspace& workspace) {
    using Config = ScanConfig<kCols>;
    const AttentionProblem& problem = call.problem;
    for_alpha_kind(problem, [&](auto kind) {
      // The scan needs the power function in its solve only: alpha = 2 takes the general one.
      constexpr AlphaKind kKind = kind == AlphaKind::kOneAndHalf ? kind() : AlphaKind::kGeneral;
      for_mask(problem, [&](auto has_mask) {
        launch<Config>(scan_kernel<Element, kHeadDim, kKind, has_mask()>,
                       grid_of(problem, ceil_div<int64_t>(problem.num_queries, Config::kBlockM), problem.num_heads),
                       call.stream, scan_params(call, workspace));
      });
    });
  }

  static void output(const Forward& call, const ForwardWorkspace& workspace) {
    using Config = OutputConfig<kCols>;
    const AttentionProblem& problem = call.problem;
    const int64_t num_chunks = ceil_div<int64_t>(problem.value_head_dim, kChunkOf<Element, Config::kValueChunk>);
    const dim3 grid =
        grid_of(problem, ceil_div<int64_t>(problem.num_queries, Config::kBlockM), problem.num_heads * num_chunks);
    order_rows(problem, workspace.scan_mask, grid, Config::kBlockM, workspace.order, stream_of(call.stream));
    for_alpha_kind(problem, [&](auto kind) {
      for_mask(problem, [&](auto has_mask) {
        launch<Config>(output_kernel<Element, kHeadDim, kind(), has_mask()>, grid, call.stream,
                       output_params(call, workspace));
      });
    });
  }

  static void delta(const Backward& call, const BackwardWorkspace& workspace) {
    const AttentionProblem& problem = call.problem;
    const DeltaParams params{problem, call.grad_out, call.gap_mean_v, call.tau, workspace.delta};
    launch_kernel(delta_kernel<Element>,
                  grid_of(problem, ceil_div<int64_t>(problem.num_queries, kDeltaRows), problem.num_heads),
                  dim3(kDeltaThreads), 0, stream_of(call.stream), params);
  }

  static void grad_query(const Backward& call, const BackwardWorkspace& workspace) {
    const AttentionProblem& problem = call.problem;
    constexpr int kBlockM = grad_block_rows(kCols);
    const dim3 grid = grid_of(problem, ceil_div<int64_t>(problem.num_queries, kBlockM), problem.num_heads);
    order_rows(problem, call.block_mask, grid, kBlockM, workspace.order, stream_of(call.stream));
    for_alpha_kind(problem, [&](auto kind) {
      for_mask(problem, [&](auto has_mask) {
        using Config = GradQueryConfig<kCols, has_mask()>;
        static_assert(Config::kBlockM == kBlockM, "blocks are ordered by those rows");
        launch<Config>(grad_query_kernel<Element, kHeadDim, kind(), has_mask()>, grid, call.stream,
                       grad_params(call, workspace, call.block_mask));
      });
    });
  }

  static void grad_key_value(const Backward& call, const BackwardWorkspace& workspace) {
    const AttentionProblem& problem = call.problem;
    if (problem.num_queries > 0) launch_mask_transpose(call, workspace);
    const int64_t largest_dim = problem.head_dim > problem.value_head_dim ? problem.head_dim : problem.value_head_dim;
    constexpr int kBlockN = grad_block_rows(kCols), kChunk = GradKeyValueConfig<kCols, true>::kGradChunk;
    const int64_t num_chunks = ceil_div<int64_t>(largest_dim, kChunkOf<Element, kChunk>);
    const dim3 grid = grid_of(problem, ceil_div<int64_t>(problem.num_keys, kBlockN), problem.num_kv_heads * num_chunks);
    order_columns(problem, workspace.column_mask, grid, kBlockN, workspace.order, stream_of(call.stream));
    for_alpha_kind(problem, [&](auto kind) {
      for_mask(problem, [&](auto has_mask) {
        using Config = GradKeyValueConfig<kCols, has_mask()>;
        static_assert(Config::kBlockN == kBlockN && Config::kGradChunk == kChunk, "blocks are ordered by those keys");
        launch<Config>(grad_key_value_kernel<Element, kHeadDim, kind(), has_mask()>, grid, call.stream,
                       grad_params(call, workspace, workspace.column_mask));
      });
    });
  }

  static void grad_alpha(const Backward& call, const BackwardWorkspace& workspace) {
    using Config = GradSumsConfig<kCols>;
    const AttentionProblem& problem = call.problem;
    if (problem.num_queries > 0) {
      launch<Config>(grad_alpha_kernel<Element, kHeadDim>,
                     grid_of(problem, ceil_div<int64_t>(problem.num_queries, Config::kBlockM), problem.num_heads),
                     call.stream,
                     GradAlphaParams{problem, call.tau, call.block_mask, call.grad_out, workspace.alpha_rows});
    }
    launch_kernel(row_sum_kernel, dim3(static_cast<unsigned>(problem.batch * problem.num_heads)), dim3(kRowSumThreads),
                  kRowSumThreads * sizeof(double), stream_of(call.stream),
                  RowSumParams{problem.num_queries, workspace.alpha_rows, call.grad_alpha});
  }

  static void grad_mask(const Backward& call, const BackwardWorkspace& workspace) {
    using Config = GradSumsConfig<kCols>;
    const AttentionProblem& problem = call.problem;
    const GradMaskWork work(problem);
    if (work.num_elements == 0) return;
    if (work.num_slabs > 0) {
      const int64_t num_key_blocks = ceil_div<int64_t>(problem.num_keys, Config::kBlockN);
      launch<Config>(grad_mask_kernel<Element, kHeadDim>,
                     dim3(static_cast<unsigned>(work.num_slabs * work.row_blocks * num_key_blocks),
                          static_cast<unsigned>(problem.num_heads / work.shared_heads),
                          static_cast<unsigned>(problem.batch / work.shared_batches)),
                     call.stream,
                     GradMaskParams{problem, call.tau, workspace.delta, call.block_mask, call.grad_out, work,
                                    work.num_slabs == 1 ? call.grad_mask : workspace.mask_slabs});
    }
    if (work.num_slabs != 1) {
      launch_kernel(slab_sum_kernel, dim3(static_cast<unsigned>(ceil_div<int64_t>(work.num_elements, kSlabSumThreads))),
                    dim3(kSlabSumThreads), 0, stream_of(call.stream),
                    SlabSumParams{work.num_slabs, work.num_elements, workspace.mask_slabs, call.grad_mask});
    }
  }

  static void split_floats(const SplitFloats& call) {
    const int64_t num_threads = call.num_rows * (call.dim / kSplitCols);
    if (num_threads == 0) return;
    launch_kernel(split_floats_kernel,
                  dim3(static_cast<unsigned>(ceil_div<int64_t>(num_threads, kSplitThreads)),
                       static_cast<unsigned>(call.num_heads), static_cast<unsigned>(call.batch)),
                  dim3(kSplitThreads), 0, stream_of(call.stream),
                  SplitFloatsParams{call.num_rows, static_cast<int>(call.dim), call.rows, call.parts});
  }

  static constexpr Passes passes(DataType dtype) {
    return {dtype,          kHeadDim,   nullptr,  kPartsOf<Element> == 3 ? split_floats : nullptr,
            scan,           output,     delta,    grad_query,
            grad_key_value, grad_alpha, grad_mask};
  }
};

}  // namespace adasplash2::cuda::sm80
