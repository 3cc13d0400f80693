// Backward, dk and dv: over the live query blocks of a block of keys, dV = P^T dO, dK = sigma dS^T Q
// (docs/algorithm.md, section 5). The heads of a group are added up inside the block, in a fixed order: no atomics, the
// same bits each run.
//
//   in   query, key, value, grad_out, tau, delta, block_mask by columns
//   out  grad_key (B, Hkv, Nk, D), grad_value (B, Hkv, Nk, Dv), data nullable: not wanted
//
// Grid (blocks of kBlockN keys, Hkv * chunks of gradient columns, B). A warp owns kKeysPerWarp keys and kWarpChunk of
// the columns, and works on the transposes S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are left operands
// without passing through shared memory. Four products a tile.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <dynamic_smem.cuh>

#include "cuda/config.h"
#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "cuda/tile/score_mask.cuh"
#include "cuda/tile/tile_copy.cuh"
#include "math/block_mask.h"
#include "math/entmax.h"

namespace adasplash2::cuda {

// The live (head, query block) pairs of one key tile, in order: heads of the group, then blocks of kBlockM rows.
template <int kBlockM>
class LiveQueryBlocks {
 public:
  __device__ __forceinline__ LiveQueryBlocks(const uint32_t* g_columns, int64_t stride_head, int first_head,
                                             int num_heads, int num_words)
      : g_columns_(g_columns),
        stride_head_(stride_head),
        head_(first_head),
        end_head_(first_head + num_heads),
        num_words_(num_words) {}

  // Moves to the next pair; false when there is none.
  __device__ __forceinline__ bool next() {
    while (bits_ == 0) {
      if (++word_ == num_words_) {
        word_ = 0;
        ++head_;
      }
      if (head_ == end_head_) return false;
      bits_ = g_columns_[head_ * stride_head_ + word_];
    }
    const int first_group = (__ffs(static_cast<int>(bits_)) - 1) / kGroups * kGroups;
    bits_ &= ~(((1u << kGroups) - 1u) << first_group);
    row_begin_ = (word_ * 32 + first_group) * kMaskRows;
    return true;
  }
  __device__ __forceinline__ int head() const { return head_; }
  __device__ __forceinline__ int row_begin() const { return row_begin_; }

 private:
  static constexpr int kGroups = kBlockM / kMaskRows;
  static_assert(32 % kGroups == 0, "a block's groups lie in one word");

  const uint32_t* g_columns_;
  int64_t stride_head_;
  int head_, end_head_, num_words_;
  int word_ = -1;
  int row_begin_ = 0;
  uint32_t bits_ = 0;
};

// A row whose tau is NaN has no probabilities, but its query, and most likely its gradient, are NaN, and 0 * NaN is not
// 0. So that it leaves the keys alone, what it brought to shared memory is cleared.
template <int kRows>
__device__ __forceinline__ bool any_is_nan(const float* s_tau) {
  bool is_any = false;
#pragma unroll
  for (int row = lane_id(); row < kRows; row += kWarpSize) is_any |= std::isnan(s_tau[row]);
  return __any_sync(kAllLanes, is_any);
}

template <int kRows, int kCols, int kThreads>
__device__ __forceinline__ void clear_rows_where_nan(uint8_t* s_tile, const float* s_tau) {
  constexpr int kRowWords = SwizzledTile<kCols>::kRowBytes / 4;
  for (int i = threadIdx.x; i < kRows * kRowWords; i += kThreads) {
    if (std::isnan(s_tau[i / kRowWords])) reinterpret_cast<uint32_t*>(s_tile)[i] = 0;
  }
}

template <typename Element, int kHeadDim, AlphaKind kKind, bool kHasMask>
__global__ void __launch_bounds__(GradKeyValueConfig<kTileCols<Element, kHeadDim>, kHasMask>::kThreads,
                                  GradKeyValueConfig<kTileCols<Element, kHeadDim>, kHasMask>::kMinBlocks)
    grad_key_value_kernel(const GradParams params) {
  constexpr int kCols = kTileCols<Element, kHeadDim>;
  using Config = GradKeyValueConfig<kCols, kHasMask>;
  constexpr int kFragmentsM = Config::kKeysPerWarp / kMmaM;     // keys are the rows here
  constexpr int kFragmentsN = Config::kQueriesPerStep / kMmaN;  // and queries the columns
  constexpr int kGradChunk = kChunkOf<Element, Config::kGradChunk>;
  constexpr int kWarpChunk = kChunkOf<Element, Config::kWarpChunk>;
  constexpr int kFragmentsGrad = kWarpChunk / kMmaN;
  constexpr int kStageBytes = Config::kBlockM * kCols * 2;
  constexpr int kStatStageBytes = Config::kBlockM * 4;

  const AttentionProblem& problem = params.problem;
  const int num_kv_heads = static_cast<int>(problem.num_kv_heads);
  const uint3 block = block_at(params.order);
  const int batch = block.z, grad_chunk = kGradChunk == kHeadDim ? 0 : block.y / num_kv_heads;
  const int kv_head = block.y - grad_chunk * num_kv_heads;
  const int group_size = static_cast<int>(problem.num_heads) / num_kv_heads;
  const int key_begin = block.x * Config::kBlockN, key_tile = key_begin / kMaskKeys;
  const int warp = warp_id(), lane = lane_id();
  const int warp_chunk = Config::kChunkWarps == 1 ? 0 : warp / Config::kKeyWarps;
  const int first_key = (warp - warp_chunk * Config::kKeyWarps) * Config::kKeysPerWarp;  // of the block's
  const int warp_key = key_begin + first_key;
  const int grad_begin = grad_chunk * kGradChunk + warp_chunk * kWarpChunk;

  const WorkRange range = work_range(problem, batch);
  const int num_keys = range.num_keys, num_rows = range.num_live_rows();
  const int key_end = min(range.length, num_keys);
  const int head_dim = static_cast<int>(problem.head_dim), value_head_dim = static_cast<int>(problem.value_head_dim);

  // Shared memory: keys | values | query ring | grad_out ring | tau ring | delta ring | first row that sees a key.
  uint8_t* smem = dynamic_smem();
  const uint32_t s_key = ptx::shared_address(smem);
  const uint32_t s_value = s_key + Config::kKeyBytes;
  const uint32_t s_query = s_value + Config::kKeyBytes;
  const uint32_t s_grad_out = s_query + Config::kQueryBytes;
  const uint32_t s_tau = s_grad_out + Config::kQueryBytes;
  const uint32_t s_delta = s_tau + Config::kStatBytes;
  const float* s_stats = reinterpret_cast<const float*>(smem + 2 * Config::kKeyBytes + 2 * Config::kQueryBytes);

  // Phase 1: keys and values stay in shared memory (their fragments would take the registers of dk and dv).
  copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(
      s_key, head_rows<const Stored<Element>>(problem.key, batch, kv_head), problem.key.stride_row, key_begin, key_end,
      head_dim);
  copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(
      s_value, head_rows<const Stored<Element>>(problem.value, batch, kv_head), problem.value.stride_row, key_begin,
      key_end, value_head_dim);
  RowFragmentsInSmem<kCols, Config::kUnroll> key[kFragmentsM], value[kFragmentsM];
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
    key[i].load(s_key, first_key + i * kMmaM);
    value[i].load(s_value, first_key + i * kMmaM);
  }

  int* s_first_row = reinterpret_cast<int*>(smem + Config::kSmemBytes - Config::kFirstRowBytes);
  for (int i = threadIdx.x; i < Config::kBlockN; i += Config::kThreads)
    s_first_row[i] = range.first_row_of(key_begin + i);
  const auto first_row_of = [&](int i, int half) {
    return s_first_row[first_key + i * kMmaM + accumulator_row(lane, half)];
  };

  // Phase 2: the live query blocks of all heads of the group, with two stages the copies one block ahead.
  const BlockMaskShape mask_shape(range.num_queries, num_keys);
  const int64_t head_words = mask_shape.column_words();
  LiveQueryBlocks<Config::kBlockM> blocks(
      params.block_mask + batch * problem.num_heads * head_words + int64_t(key_tile) * mask_shape.group_words(),
      head_words, kv_head * group_size, group_size, mask_shape.group_words());
  const auto copy = [&](int stage) {
    const int head = blocks.head(), row_begin = blocks.row_begin();
    copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(
        s_query + stage * kStageBytes, head_rows<const Stored<Element>>(problem.query, batch, head),
        problem.query.stride_row, row_begin, num_rows, head_dim);
    copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(
        s_grad_out + stage * kStageBytes, head_rows<const Stored<Element>>(params.grad_out, batch, head),
        params.grad_out.stride_row, row_begin, num_rows, value_head_dim);
    for (int i = threadIdx.x; i < Config::kBlockM; i += Config::kThreads) {
      const bool is_there = row_begin + i < num_rows;
      const int64_t index = is_there ? row_index(problem, batch, head, row_begin + i) : 0;
      ptx::cp_async_4(s_tau + stage * kStatStageBytes + i * 4, params.tau + index, is_there ? 4 : 0);
      ptx::cp_async_4(s_delta + stage * kStatStageBytes + i * 4, params.delta + index, is_there ? 4 : 0);
    }
  };

  float grad_key[kFragmentsM][kFragmentsGrad][4], grad_value[kFragmentsM][kFragmentsGrad][4];
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
    clear(grad_key[i]);
    clear(grad_value[i]);
  }
  bool has_block = num_rows > 0 && blocks.next();
  if (Config::kStages == 2 && has_block) copy(0);
  ptx::cp_async_commit();
  for (int stage = 0; has_block; stage ^= Config::kStages - 1) {
    const int head = blocks.head(), row_begin = blocks.row_begin();
    if constexpr (Config::kStages == 1) {
      __syncthreads();
      copy(0);
      ptx::cp_async_commit();
    }
    has_block = blocks.next();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (Config::kStages == 2 && has_block) copy(stage ^ 1);
    ptx::cp_async_commit();

    const float alpha = head_alpha(problem, batch, head), to_z = score_to_z(problem, alpha);
    const EntmaxOf<Element, kKind> entmax{alpha};
    const float* s_block_tau = s_stats + stage * Config::kBlockM;
    if (any_is_nan<Config::kBlockM>(s_block_tau)) {
      clear_rows_where_nan<Config::kBlockM, kCols, Config::kThreads>(smem + 2 * Config::kKeyBytes + stage * kStageBytes,
                                                                     s_block_tau);
      clear_rows_where_nan<Config::kBlockM, kCols, Config::kThreads>(
          smem + 2 * Config::kKeyBytes + Config::kQueryBytes + stage * kStageBytes, s_block_tau);
      __syncthreads();
    }
    const float* s_block_delta = s_block_tau + Config::kStages * Config::kBlockM;
    // No pair of the block is masked where its first row sees the tile's last key and its last row is not padding.
    const bool is_edge =
        range.num_visible_keys(row_begin) < key_begin + Config::kBlockN || row_begin + Config::kBlockM > num_rows;

#pragma unroll 1
    for (int first_row = 0; first_row < Config::kBlockM; first_row += Config::kQueriesPerStep) {
      const uint32_t step_offset = stage * kStageBytes + first_row * kCols * 2;
      // Transposed: 16 kFragmentsM keys x kQueriesPerStep queries.
      float weight[kFragmentsM][kFragmentsN][4];
      const auto multiply = [&] { multiply_transposed<Element, kCols>(weight, key, s_query + step_offset); };
      if constexpr (kHasMask) {
        ScoreMask<Element>(problem.mask, batch, head, score_scale(problem))
            .multiply_masked_transposed(
                weight, row_begin + first_row, warp_key,
                [&](int i, int n, int half, int parity) {
                  const int row = row_begin + first_row + n * kMmaN + accumulator_col(lane, parity);
                  return !is_edge || (row >= first_row_of(i, half) && row < num_rows);
                },
                multiply);
      } else {
        multiply();
      }
      bool is_live = false;
      MmaOperand<Element> prob[kFragmentsN / 2][kFragmentsM];  // rounded at once: half the registers
#pragma unroll
      for (int k = 0; k < kFragmentsN / 2; ++k) {
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
          float exact[2][4];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int n = 2 * k + j;
              const int col = first_row + n * kMmaN + accumulator_col(lane, e % 2), row = row_begin + col;
              float gap = fmaxf(weight[i][n][e] * to_z - s_block_tau[col], 0.0f);
              if (is_edge && (row < first_row_of(i, e / 2) || row >= num_rows)) gap = 0.0f;
              weight[i][n][e] = entmax.weight(gap);
              exact[j][e] = entmax.prob(gap, weight[i][n][e]);
              is_live |= gap > 0.0f;
            }
          }
          prob[k][i] = operand_of_accumulators<Element>(exact[0], exact[1]);
        }
      }
      if (!__any_sync(kAllLanes, is_live)) continue;

#pragma unroll
      for (int k = 0; k < kFragmentsN / 2; ++k) {
        multiply_add<Element, kCols>(grad_value, prob[k], s_grad_out + step_offset, k * kMmaK, grad_begin);
      }
      float grad_prob[kFragmentsM][kFragmentsN][4];  // transposed too
      multiply_transposed<Element, kCols>(grad_prob, value, s_grad_out + step_offset);
#pragma unroll
      for (int k = 0; k < kFragmentsN / 2; ++k) {
        MmaOperand<Element> grad_score[kFragmentsM];
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
          for (int n = 2 * k; n < 2 * k + 2; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float delta = s_block_delta[first_row + n * kMmaN + accumulator_col(lane, e % 2)];
              grad_prob[i][n][e] = weight[i][n][e] * (grad_prob[i][n][e] - delta);
            }
          }
          grad_score[i] = operand_of_accumulators<Element>(grad_prob[i][2 * k], grad_prob[i][2 * k + 1]);
        }
        multiply_add<Element, kCols>(grad_key, grad_score, s_query + step_offset, k * kMmaK, grad_begin);
      }
    }
  }
  ptx::cp_async_wait<0>();

  // Phase 3: store.
  const float scale = static_cast<float>(problem.scale);
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
    for (int n = 0; n < kFragmentsGrad; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) grad_key[i][n][e] *= scale;
    }
    const int fragment_key = warp_key + i * kMmaM;
    const auto store = [&](const Rows& rows, const float (&acc)[kFragmentsGrad][4], int num_cols) {
      Element* g_rows = head_rows<Element>(rows, batch, kv_head) + fragment_key * rows.stride_row + grad_begin;
      store_rows(g_rows, rows.stride_row, acc, num_keys - fragment_key, num_cols - grad_begin);
    };
    if (params.grad_key.data != nullptr) store(params.grad_key, grad_key[i], head_dim);
    if (params.grad_value.data != nullptr) store(params.grad_value, grad_value[i], value_head_dim);
  }
}

}  // namespace adasplash2::cuda
