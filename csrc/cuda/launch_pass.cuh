// What launching a pass takes on every architecture: its parameters, the kernel's template for alpha, its grid.
#pragma once

#include <cuda_runtime.h>

#include <launch_kernel.cuh>
#include <type_traits>

#include "cuda/any_arch/mask_transpose.cuh"
#include "cuda/any_arch/work_order.cuh"
#include "cuda/config.h"
#include "cuda/pass_params.h"
#include "cuda/passes.h"
#include "math/entmax.h"
#include "math/work_range.h"
#include "params.h"

namespace adasplash2::cuda {

// launch(std::integral_constant<AlphaKind, ...>): kernels are templates over what alpha is. A tensor of alphas is known
// to the device only.
template <typename Launch>
void for_alpha_kind(const AttentionProblem& problem, const Launch& launch) {
  switch (problem.alpha_heads == nullptr ? alpha_kind(problem.alpha) : AlphaKind::kGeneral) {
    case AlphaKind::kOneAndHalf:
      return launch(std::integral_constant<AlphaKind, AlphaKind::kOneAndHalf>{});
    case AlphaKind::kTwo:
      return launch(std::integral_constant<AlphaKind, AlphaKind::kTwo>{});
    case AlphaKind::kGeneral:
      return launch(std::integral_constant<AlphaKind, AlphaKind::kGeneral>{});
  }
}

// Blocks x heads x sequences.
inline dim3 grid_of(const AttentionProblem& problem, int64_t num_blocks, int64_t num_heads) {
  return dim3(static_cast<unsigned>(num_blocks), static_cast<unsigned>(num_heads),
              static_cast<unsigned>(problem.batch));
}

inline ScanParams scan_params(const Forward& call, const ForwardWorkspace& workspace) {
  return {call.problem, workspace.tau_lower, workspace.is_coarse, workspace.scan_mask, workspace.tile_excess};
}

inline OutputParams output_params(const Forward& call, const ForwardWorkspace& workspace) {
  return {call.problem,           workspace.tau_lower,
          workspace.is_coarse,    workspace.scan_mask,
          workspace.order.blocks, call.out,
          call.gap_mean_v,        call.tau,
          call.support_size,      call.block_mask};
}

inline GradParams grad_params(const Backward& call, const BackwardWorkspace& workspace, const uint32_t* block_mask) {
  return {call.problem,  call.tau,        workspace.delta, block_mask,     workspace.order.blocks,
          call.grad_out, call.grad_query, call.grad_key,   call.grad_value};
}

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// Puts the blocks of a grid, of rows or of keys in all heads of a group, in order of their live tiles.
inline void order_blocks(WorkLevelsParams work, const WorkOrder& order, cudaStream_t stream) {
  work.levels = order.levels;
  const int64_t num_blocks = int64_t(work.grid.x) * work.grid.y * work.grid.z;
  launch_kernel(work_levels_kernel, dim3(static_cast<unsigned>(ceil_div<int64_t>(num_blocks, kWorkLevelWarps))),
                dim3(kWorkLevelWarps * kWarpSize), 0, stream, work);
  launch_kernel(work_order_kernel, dim3(1), dim3(kWorkOrderThreads), kWorkOrderBytes, stream,
                WorkOrderParams{work.grid, order.levels, order.blocks});
}
inline void order_rows(const AttentionProblem& problem, const uint32_t* mask, dim3 grid, int block_rows,
                       const WorkOrder& order, cudaStream_t stream) {
  const BlockMaskShape shape = mask_shape(problem);
  const int block_words = block_rows / kMaskRows * shape.key_words();
  order_blocks({mask, grid, static_cast<int>(problem.num_heads), 1, 1, block_words, block_words, shape.row_words(), 0,
                shape.row_words()},
               order, stream);
}
inline void order_columns(const AttentionProblem& problem, const uint32_t* mask, dim3 grid, int block_keys,
                          const WorkOrder& order, cudaStream_t stream) {
  const BlockMaskShape shape = mask_shape(problem);
  const int group_size = static_cast<int>(problem.num_heads / problem.num_kv_heads);
  const int blocks_a_tile = block_keys < kMaskKeys ? kMaskKeys / block_keys : 1;
  const int block_words = block_keys * blocks_a_tile / kMaskKeys * shape.group_words();
  order_blocks({mask, grid, static_cast<int>(problem.num_kv_heads), blocks_a_tile, group_size, block_words, block_words,
                group_size * shape.column_words(), shape.column_words(), shape.column_words()},
               order, stream);
}

// The block mask by columns, into the workspace.
inline void launch_mask_transpose(const Backward& call, const BackwardWorkspace& workspace) {
  const AttentionProblem& problem = call.problem;
  const BlockMaskShape shape = mask_shape(problem);
  launch_kernel(mask_transpose_kernel,
                dim3(static_cast<unsigned>(problem.batch * problem.num_heads), shape.group_words(), shape.key_words()),
                dim3(kWarpSize), 0, stream_of(call.stream),
                MaskTransposeParams{shape, call.block_mask, workspace.column_mask});
}

}  // namespace adasplash2::cuda
