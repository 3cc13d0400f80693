// The passes of one instance, in order, on one stream.
#pragma once

#include <cuda_runtime.h>

#include <launch_kernel.cuh>

#include "cuda/any_arch/delta.cuh"
#include "cuda/any_arch/mask_transpose.cuh"
#include "cuda/config.h"
#include "cuda/passes.h"
#include "cuda/sm80/grad_key_value.cuh"
#include "cuda/sm80/grad_query.cuh"
#include "cuda/sm80/output.cuh"
#include "cuda/sm80/scan.cuh"
#include "math/work_range.h"

namespace adasplash2::cuda::sm80 {

template <typename Element, int kHeadDim>
struct Instance {
  // A tensor of alphas is known to the device only.
  static AlphaKind kind_of(const AttentionProblem& problem) {
    return problem.alpha_heads == nullptr ? alpha_kind(problem.alpha) : AlphaKind::kGeneral;
  }

  static dim3 grid_of(const AttentionProblem& problem, int64_t num_blocks, int64_t num_heads) {
    return dim3(static_cast<unsigned>(num_blocks), static_cast<unsigned>(num_heads),
                static_cast<unsigned>(problem.batch));
  }

  template <AlphaKind kKind>
  static void forward_of(const Forward& call, const ForwardWorkspace& workspace) {
    using Scan = ScanConfig<kHeadDim>;
    using Output = OutputConfig<kHeadDim>;
    // The scan needs the power function in its solve only: alpha = 2 takes the general one.
    constexpr AlphaKind kScanKind = kKind == AlphaKind::kOneAndHalf ? kKind : AlphaKind::kGeneral;
    const AttentionProblem& problem = call.problem;
    const cudaStream_t stream = static_cast<cudaStream_t>(call.stream);

    const ScanParams scan{problem, workspace.tau_lower, workspace.is_coarse, workspace.scan_mask,
                          workspace.tile_excess};
    launch_kernel(scan_kernel<Element, kHeadDim, kScanKind>,
                  grid_of(problem, ceil_div<int64_t>(problem.num_queries, Scan::kBlockM), problem.num_heads),
                  dim3(Scan::kThreads), Scan::kSmemBytes, stream, scan);

    const OutputParams output{
        problem,  workspace.tau_lower, workspace.is_coarse, workspace.scan_mask, call.out, call.gap_mean_v,
        call.tau, call.support_size,   call.block_mask};
    const int64_t num_chunks = ceil_div<int64_t>(problem.value_head_dim, Output::kValueChunk);
    launch_kernel(
        output_kernel<Element, kHeadDim, kKind>,
        grid_of(problem, ceil_div<int64_t>(problem.num_queries, Output::kBlockM), problem.num_heads * num_chunks),
        dim3(Output::kThreads), Output::kSmemBytes, stream, output);
  }

  template <AlphaKind kKind>
  static void backward_of(const Backward& call, const BackwardWorkspace& workspace) {
    using Query = GradQueryConfig<kHeadDim>;
    using KeyValue = GradKeyValueConfig<kHeadDim>;
    const AttentionProblem& problem = call.problem;
    const cudaStream_t stream = static_cast<cudaStream_t>(call.stream);

    const DeltaParams delta{problem, call.grad_out, call.gap_mean_v, workspace.delta};
    launch_kernel(delta_kernel<Element>,
                  grid_of(problem, ceil_div<int64_t>(problem.num_queries, kDeltaWarps), problem.num_heads),
                  dim3(kDeltaWarps * kWarpSize), 0, stream, delta);

    GradParams grad{problem,       call.tau,        workspace.delta, call.block_mask,
                    call.grad_out, call.grad_query, call.grad_key,   call.grad_value};
    if (call.grad_query.data != nullptr) {
      launch_kernel(grad_query_kernel<Element, kHeadDim, kKind>,
                    grid_of(problem, ceil_div<int64_t>(problem.num_queries, Query::kBlockM), problem.num_heads),
                    dim3(Query::kThreads), Query::kSmemBytes, stream, grad);
    }
    if (problem.num_keys == 0 || (call.grad_key.data == nullptr && call.grad_value.data == nullptr)) return;

    const BlockMaskShape shape(static_cast<int>(problem.num_queries), static_cast<int>(problem.num_keys));
    launch_kernel(
        mask_transpose_kernel,
        dim3(static_cast<unsigned>(problem.batch * problem.num_heads), shape.group_words(), shape.key_words()),
        dim3(kWarpSize), 0, stream, MaskTransposeParams{shape, call.block_mask, workspace.column_mask});
    grad.block_mask = workspace.column_mask;
    const int64_t largest_dim = problem.head_dim > problem.value_head_dim ? problem.head_dim : problem.value_head_dim;
    const int64_t num_chunks = ceil_div<int64_t>(largest_dim, KeyValue::kGradChunk);
    launch_kernel(grad_key_value_kernel<Element, kHeadDim, kKind>,
                  grid_of(problem, shape.num_key_tiles, problem.num_kv_heads * num_chunks), dim3(KeyValue::kThreads),
                  KeyValue::kSmemBytes, stream, grad);
  }

  static void forward(const Forward& call, const ForwardWorkspace& workspace) {
    switch (kind_of(call.problem)) {
      case AlphaKind::kOneAndHalf:
        return forward_of<AlphaKind::kOneAndHalf>(call, workspace);
      case AlphaKind::kTwo:
        return forward_of<AlphaKind::kTwo>(call, workspace);
      case AlphaKind::kGeneral:
        return forward_of<AlphaKind::kGeneral>(call, workspace);
    }
  }

  static void backward(const Backward& call, const BackwardWorkspace& workspace) {
    switch (kind_of(call.problem)) {
      case AlphaKind::kOneAndHalf:
        return backward_of<AlphaKind::kOneAndHalf>(call, workspace);
      case AlphaKind::kTwo:
        return backward_of<AlphaKind::kTwo>(call, workspace);
      case AlphaKind::kGeneral:
        return backward_of<AlphaKind::kGeneral>(call, workspace);
    }
  }
};

}  // namespace adasplash2::cuda::sm80
