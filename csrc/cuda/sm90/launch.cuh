// The passes of one instance on Hopper: wgmma, TMA, warp specialisation (sm_90a).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
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

// The blocks of block_rows rows of num_heads heads a sequence. All blocks of a head read head_bytes of keys and values,
// or of whatever is not their own.
inline WorkQueue work_queue(const AttentionProblem& problem, int64_t num_rows, int block_rows, int64_t num_heads,
                            int64_t head_bytes, bool is_last_first, const BlockAt* order, uint32_t* num_taken) {
  // Under is_causal the blocks of a head have unequal work, and the longest of many heads come first, so that the last
  // ones to run are short. What these heads read stays in the L2 cache (50 MB).
  // NOTE: H200, 65536 tokens of 8 heads, N = 4096, 10% live, causal, milliseconds of all passes with groups of 1, 8 and
  // 32 heads: 1.319, 1.297, 1.262 (head dim 64, 1 MB a head), 1.840, 1.818, 1.865 (128, 2 MB a head). Not
  // causal: 1.662, 1.661, 1.689 (64).
  constexpr int64_t kGroupBytes = 32 << 20;
  const int64_t num_blocks = ceil_div<int64_t>(num_rows, block_rows), num_all_heads = num_heads * problem.batch;
  const int64_t group_size = problem.is_causal ? kGroupBytes / std::max<int64_t>(head_bytes, 1) : 1;
  return {static_cast<uint32_t>(num_blocks),
          static_cast<uint32_t>(num_heads),
          static_cast<uint32_t>(num_blocks * num_all_heads),
          static_cast<uint32_t>(std::clamp<int64_t>(group_size, 1, num_all_heads)),
          is_last_first,
          order,
          num_taken};
}
inline WorkQueue query_blocks(const AttentionProblem& problem, int block_rows, const BlockAt* blocks,
                              uint32_t* num_taken) {
  const int64_t head_bytes = problem.num_keys * (problem.head_dim + problem.value_head_dim) * size_of(problem.dtype) *
                             problem.num_kv_heads / problem.num_heads;
  return work_queue(problem, problem.num_queries, block_rows, problem.num_heads, head_bytes, problem.is_causal, blocks,
                    num_taken);
}
inline WorkQueue key_blocks(const AttentionProblem& problem, int block_rows, const BlockAt* blocks,
                            uint32_t* num_taken) {
  const int64_t head_bytes = problem.num_queries * (problem.head_dim + problem.value_head_dim) *
                             size_of(problem.dtype) * (problem.num_heads / problem.num_kv_heads);
  return work_queue(problem, problem.num_keys, block_rows, problem.num_kv_heads, head_bytes, false, blocks, num_taken);
}

// The blocks in order of their live tiles by rows or columns of a mask; null where that does not pay.
inline const BlockAt* ordered_query_blocks(const AttentionProblem& problem, const uint32_t* mask, int block_rows,
                                           const WorkOrder& order, cudaStream_t stream) {
  if (problem.num_keys < kOrderedLength) return nullptr;
  const int64_t num_blocks = ceil_div<int64_t>(problem.num_queries, block_rows);
  order_rows(problem, mask, grid_of(problem, num_blocks, problem.num_heads), block_rows, order, stream);
  return order.blocks;
}
inline const BlockAt* ordered_key_blocks(const AttentionProblem& problem, const uint32_t* mask, int block_keys,
                                         const WorkOrder& order, cudaStream_t stream) {
  if (problem.num_queries * (problem.num_heads / problem.num_kv_heads) < kOrderedLength) return nullptr;
  const int64_t num_blocks = ceil_div<int64_t>(problem.num_keys, block_keys);
  order_columns(problem, mask, grid_of(problem, num_blocks, problem.num_kv_heads), block_keys, order, stream);
  return order.blocks;
}

// For a launch of blocks that stay, one on each SM: their number. No item is taken then.
inline uint32_t prepare_staying(const WorkQueue& queue, cudaStream_t stream) {
  int device = 0, num_sms = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const uint32_t num_blocks = std::min(static_cast<uint32_t>(num_sms), queue.num_items);
  if (num_blocks < queue.num_items) {
    check_cuda(cudaMemsetAsync(queue.num_taken, 0, sizeof *queue.num_taken, stream), "cudaMemsetAsync");
  }
  return num_blocks;
}

template <typename Element, int kHeadDim>
struct Instance {
  static void scan(const Forward& call, const ForwardWorkspace& workspace) {
    using Config = ScanConfig<kHeadDim>;
    const AttentionProblem& problem = call.problem;
    const cudaStream_t stream = stream_of(call.stream);
    const ScanWithMaps params{query_rows_map(problem, problem.query, problem.head_dim, kWgmmaM),
                              key_rows_map(problem, problem.key, problem.head_dim, Config::kBlockN),
                              scan_params(call, workspace),
                              query_blocks(problem, Config::kBlockM, nullptr, workspace.order.num_taken)};
    for_alpha_kind(problem, [&](auto kind) {
      launch_kernel(scan_kernel<Element, kHeadDim, kind()>, dim3(prepare_staying(params.queue, stream)),
                    dim3(Config::kThreads), Config::kSmemBytes, stream, params);
    });
  }

  static void refine(const Forward& call, const ForwardWorkspace& workspace, const BlockAt* blocks) {
    using Config = RefineConfig<kHeadDim>;
    const AttentionProblem& problem = call.problem;
    const RefineParams params{problem,
                              workspace.tau_lower,
                              workspace.is_coarse,
                              workspace.scan_mask,
                              blocks,
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
    const cudaStream_t stream = stream_of(call.stream);
    static_assert(Config::kBlockM == RefineConfig<kHeadDim>::kBlockM, "both passes have the same blocks");
    const BlockAt* const blocks =
        ordered_query_blocks(problem, workspace.scan_mask, Config::kBlockM, workspace.order, stream);
    refine(call, workspace, blocks);
    const OutputParams params = with_tensor_maps<kHeadDim>(
        output_params(call, workspace), query_blocks(problem, Config::kBlockM, blocks, workspace.order.num_taken));
    const auto launch = [&](auto kernel) {
      launch_kernel(kernel, dim3(prepare_staying(params.queue, stream)), dim3(Config::kThreads),
                    OutputSmem<kHeadDim>::kBytes, stream, params);
    };
    const bool wants_weights = call.gap_mean_v.data != nullptr || call.support_size != nullptr;
    for_alpha_kind(problem, [&](auto kind) {
      if constexpr (kind() == AlphaKind::kOneAndHalf) {
        if (!wants_weights) return launch(output_kernel<Element, kHeadDim, kind(), false>);
      }
      launch(output_kernel<Element, kHeadDim, kind(), true>);
    });
  }

  static void grad_query(const Backward& call, const BackwardWorkspace& workspace) {
    using Config = GradQueryConfig<kHeadDim>;
    const cudaStream_t stream = stream_of(call.stream);
    const AttentionProblem& problem = call.problem;
    const BlockAt* const blocks =
        ordered_query_blocks(problem, call.block_mask, Config::kBlockM, workspace.order, stream);
    const GradQueryParams params =
        with_tensor_maps<kHeadDim>(grad_params(call, workspace, call.block_mask),
                                   query_blocks(problem, Config::kBlockM, blocks, workspace.order.num_taken));
    for_alpha_kind(problem, [&](auto kind) {
      launch_kernel(grad_query_kernel<Element, kHeadDim, kind()>, dim3(prepare_staying(params.queue, stream)),
                    dim3(Config::kThreads), GradQuerySmem<kHeadDim>::kBytes, stream, params);
    });
  }

  static void grad_key_value(const Backward& call, const BackwardWorkspace& workspace) {
    using Config = GradKeyValueConfig<kHeadDim>;
    const AttentionProblem& problem = call.problem;
    const cudaStream_t stream = stream_of(call.stream);
    launch_mask_transpose(call, workspace);
    const BlockAt* const blocks =
        ordered_key_blocks(problem, workspace.column_mask, Config::kBlockN, workspace.order, stream);
    const auto of_gradient = [&](const Rows& rows, const Rows& like, int64_t dim) {
      return key_rows_map(problem, rows.data != nullptr ? rows : like, dim, kMmaM);
    };
    const GradKeyValueParams params{grad_params(call, workspace, workspace.column_mask),
                                    key_blocks(problem, Config::kBlockN, blocks, workspace.order.num_taken),
                                    query_rows_map(problem, problem.query, problem.head_dim, Config::kBlockM),
                                    query_rows_map(problem, call.grad_out, problem.value_head_dim, Config::kBlockM),
                                    key_rows_map(problem, problem.key, problem.head_dim, kMaskKeys),
                                    key_rows_map(problem, problem.value, problem.value_head_dim, kMaskKeys),
                                    of_gradient(call.grad_key, problem.key, problem.head_dim),
                                    of_gradient(call.grad_value, problem.value, problem.value_head_dim)};
    const uint32_t num_blocks = Config::kStays ? prepare_staying(params.queue, stream) : params.queue.num_items;
    for_alpha_kind(problem, [&](auto kind) {
      launch_kernel(grad_key_value_kernel<Element, kHeadDim, kind()>, dim3(num_blocks), dim3(Config::kThreads),
                    GradKeyValueSmem<kHeadDim>::kBytes, stream, params);
    });
  }

  static constexpr Passes passes(DataType dtype) {
    return {dtype, kHeadDim, runs_here, nullptr, scan, output, nullptr, grad_query, grad_key_value};
  }
};

}  // namespace adasplash2::cuda::sm90
