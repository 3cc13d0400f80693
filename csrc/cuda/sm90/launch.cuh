// The passes of one instance on Hopper: wgmma, TMA, warp specialisation (sm_90a).
#pragma once

#include <cuda_runtime.h>

#include <launch_kernel.cuh>

#include "cuda/launch_pass.cuh"
#include "cuda/passes.h"
#include "cuda/sm90/grad_key_value.cuh"
#include "cuda/sm90/grad_query.cuh"
#include "cuda/sm90/output.cuh"
#include "cuda/sm90/refine.cuh"
#include "cuda/sm90/scan.cuh"
#include "cuda/sm90/tensor_maps.cuh"
#include "math/work_range.h"

namespace adasplash2::cuda::sm90 {

// sm_90a is one generation: neither an older nor a newer GPU has its instructions.
inline bool runs_here() {
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
}

template <typename Element, int kHeadDim>
struct Instance {
  static void scan(const Forward& call, const ForwardWorkspace& workspace) {
    using Config = ScanConfig<kHeadDim>;
    const AttentionProblem& problem = call.problem;
    const ScanWithMaps params{rows_map(problem.query, problem.dtype, problem.head_dim, problem.num_queries,
                                       problem.num_heads, problem.batch, kWgmmaM),
                              rows_map(problem.key, problem.dtype, problem.head_dim, problem.num_keys,
                                       problem.num_kv_heads, problem.batch, Config::kBlockN),
                              scan_params(call, workspace)};
    for_alpha_kind(problem, [&](auto kind) {
      launch_kernel(scan_kernel<Element, kHeadDim, kind()>,
                    grid_of(problem, ceil_div<int64_t>(problem.num_queries, Config::kBlockM), problem.num_heads),
                    dim3(Config::kThreads), Config::kSmemBytes, stream_of(call.stream), params);
    });
  }

  static void refine(const Forward& call, const ForwardWorkspace& workspace) {
    using Config = RefineConfig<kHeadDim>;
    const AttentionProblem& problem = call.problem;
    const RefineParams params{problem,
                              workspace.tau_lower,
                              workspace.is_coarse,
                              workspace.scan_mask,
                              call.tau,
                              query_rows_map(problem, problem.query, problem.head_dim, kRowsPerConsumer),
                              key_rows_map(problem, problem.key, problem.head_dim, Config::kBlockN)};
    for_alpha_kind(problem, [&](auto kind) {
      launch_kernel(refine_kernel<Element, kHeadDim, kind()>,
                    grid_of(problem, ceil_div<int64_t>(problem.num_queries, Config::kBlockM), problem.num_heads),
                    dim3(Config::kThreads), RefineSmem<kHeadDim>::kBytes, stream_of(call.stream), params);
    });
  }

  static void output(const Forward& call, const ForwardWorkspace& workspace) {
    using Config = OutputConfig<kHeadDim>;
    const AttentionProblem& problem = call.problem;
    refine(call, workspace);
    const bool wants_weights = call.gap_mean_v.data != nullptr || call.support_size != nullptr;
    const auto launch = [&](auto kernel) {
      launch_kernel(kernel,
                    grid_of(problem, ceil_div<int64_t>(problem.num_queries, Config::kBlockM), problem.num_heads),
                    dim3(Config::kThreads), OutputSmem<kHeadDim>::kBytes, stream_of(call.stream),
                    with_tensor_maps<kHeadDim>(output_params(call, workspace)));
    };
    for_alpha_kind(problem, [&](auto kind) {
      if constexpr (kind() == AlphaKind::kOneAndHalf) {
        if (!wants_weights) return launch(output_kernel<Element, kHeadDim, kind(), false>);
      }
      launch(output_kernel<Element, kHeadDim, kind(), true>);
    });
  }

  static void grad_query(const Backward& call, const BackwardWorkspace& workspace) {
    using Config = GradQueryConfig<kHeadDim>;
    for_alpha_kind(call.problem, [&](auto kind) {
      launch_kernel(
          grad_query_kernel<Element, kHeadDim, kind()>,
          grid_of(call.problem, ceil_div<int64_t>(call.problem.num_queries, Config::kBlockM), call.problem.num_heads),
          dim3(Config::kThreads), GradQuerySmem<kHeadDim>::kBytes, stream_of(call.stream),
          with_tensor_maps<kHeadDim>(grad_params(call, workspace, call.block_mask)));
    });
  }

  static void grad_key_value(const Backward& call, const BackwardWorkspace& workspace) {
    using Config = GradKeyValueConfig<kHeadDim>;
    const AttentionProblem& problem = call.problem;
    launch_mask_transpose(call, workspace);
    const auto map = [&](const Rows& rows, int64_t dim, int64_t num_rows, int64_t num_heads, int box_rows) {
      return rows_map(rows, problem.dtype, dim, num_rows, num_heads, problem.batch, box_rows);
    };
    const auto of_queries = [&](const Rows& rows, int64_t dim) {
      return map(rows, dim, problem.num_queries, problem.num_heads, Config::kBlockM);
    };
    const auto of_keys = [&](const Rows& rows, int64_t dim, int box_rows) {
      return map(rows, dim, problem.num_keys, problem.num_kv_heads, box_rows);
    };
    const auto of_gradient = [&](const Rows& rows, const Rows& like, int64_t dim) {
      return of_keys(rows.data != nullptr ? rows : like, dim, kMmaM);
    };
    const GradKeyValueMaps maps{of_queries(problem.query, problem.head_dim),
                                of_queries(call.grad_out, problem.value_head_dim),
                                of_keys(problem.key, problem.head_dim, kMaskKeys),
                                of_keys(problem.value, problem.value_head_dim, kMaskKeys),
                                of_gradient(call.grad_key, problem.key, problem.head_dim),
                                of_gradient(call.grad_value, problem.value, problem.value_head_dim)};
    const dim3 grid = grid_of(problem, ceil_div<int64_t>(problem.num_keys, Config::kBlockN), problem.num_kv_heads);
    for_alpha_kind(problem, [&](auto kind) {
      launch_kernel(grad_key_value_kernel<Element, kHeadDim, kind()>, grid, dim3(Config::kThreads),
                    GradKeyValueSmem<kHeadDim>::kBytes, stream_of(call.stream),
                    grad_params(call, workspace, workspace.column_mask), maps);
    });
  }

  static constexpr Passes passes(DataType dtype) {
    return {dtype, kHeadDim, runs_here, nullptr, scan, output, nullptr, grad_query, grad_key_value};
  }
};

}  // namespace adasplash2::cuda::sm90
