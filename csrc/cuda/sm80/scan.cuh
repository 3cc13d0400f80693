// Pass A, the scan: one dense pass over the keys gives every row a lower bound of tau (docs/kernels.md, "Scan").
//
//   in   query (B, H, Nq, D), key (B, Hkv, Nk, D)
//   out  tau_lower (B, H, Nq) float, in units of z; +inf for a row without keys, NaN for a row with a NaN or +inf score
//        is_coarse (B, H, Nq) uint8, 1 where tau may lie too far above tau_lower for the output pass to fold in
//        block_mask (rows, see block_mask.h): 0 where no score of the tile exceeds a lower bound of its row's tau
//   own  tile_excess (B, H, row groups, key tiles) uint16
//
// Grid (blocks of kBlockM rows, H, B); a block walks the key tiles from the last visible one down: under is_causal the
// blocks with most work start first, and the nearest keys, often the heaviest, raise the bounds early.
// A warp owns kRowsPerWarp rows and shares nothing but the key tiles with the others.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <dynamic_smem.cuh>
#include <type_traits>

#include "cuda/config.h"
#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/max.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "cuda/tile/score_mask.cuh"
#include "cuda/tile/tile_copy.cuh"
#include "cuda/tile/tile_excess.cuh"
#include "math/block_mask.h"
#include "math/histogram.h"

namespace adasplash2::cuda {

// What a warp knows of its rows so far. A lane keeps the rows of its quad, kRowsPerLane of them, in registers; their
// histograms and the lists of hits that have yet to enter them are in shared memory.
template <int kHeadDim, AlphaKind kKind>
struct RowBounds {
  using Config = ScanConfig<kHeadDim>;
  static constexpr int kRows = Config::kRowsPerLane;
  static constexpr int kListStride = kWarpSize;  // entry e of all lanes side by side: no bank conflict
  static constexpr int kListSize = Config::kHitsPerList * kListStride;

  uint32_t* s_histogram;  // [kRowsPerWarp][kRowWords], this warp's rows
  float* s_hits;          // [kWarps][kRows][kHitsPerList][kWarpSize], all warps': an index alone is then an address
  float* s_snapshots;     // [kSnapshots][kRowsPerWarp], thresholds as they were
  float to_z, from_z;
  Entmax<kKind> entmax;

  float row_max[kRows];    // of the scores; +inf once a score of the row is NaN or +inf
  float threshold[kRows];  // in units of the score: at or below tau, so only scores above it can matter
  int first_list;          // index in s_hits of this lane's first list
  int list_end[kRows];     // and of the end of what is in each

  __device__ __forceinline__ void init(int warp, uint32_t* s_histograms, float* s_all_hits, float* s_all_snapshots,
                                       float to_z_, float alpha) {
    s_histogram = s_histograms + warp * Config::kRowsPerWarp * Config::kRowWords;
    s_hits = s_all_hits;
    first_list = warp * kRows * kListSize + lane_id();
    s_snapshots = s_all_snapshots + warp * Config::kSnapshots * Config::kRowsPerWarp;
    to_z = to_z_;
    from_z = 1.0f / to_z_;
    entmax.alpha = alpha;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row_max[r] = -INFINITY;
      threshold[r] = -INFINITY;
      list_end[r] = list_begin(r);
    }
    for (int i = lane_id(); i < Config::kRowsPerWarp * Config::kRowWords; i += kWarpSize) s_histogram[i] = 0;
    __syncwarp();
  }

  static __device__ __forceinline__ int row_in_warp(int lane, int r) { return lane / 4 + 8 * r; }

  __device__ __forceinline__ int list_begin(int r) const { return first_list + r * kListSize; }

  // The largest score that is certainly at or below z.
  __device__ __forceinline__ float score_below(float z) const {
    const float score = z * from_z;
    return score - fabsf(score) * 0x1p-22f;
  }

  __device__ __forceinline__ void raise_threshold(int r, float tau_lower) {
    threshold[r] = fmaxf(threshold[r], score_below(tau_lower));
  }

  // tau >= row_max - 1
  __device__ __forceinline__ void raise_threshold_to_window(int r, float max_score) {
    raise_threshold(r, round_below(max_score * to_z - 1.0f));
  }

  // A NaN is a hit: it must be seen.
  __device__ __forceinline__ bool is_hit(int r, float score) const { return !(score <= threshold[r]); }

  __device__ __forceinline__ void append(int r, float score) {
    if (is_hit(r, score)) {
      s_hits[list_end[r]] = score;
      list_end[r] += kListStride;
    }
  }

  __device__ __forceinline__ bool may_overflow() const {
    bool is_full = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      is_full |= list_end[r] - list_begin(r) > (Config::kHitsPerList - Config::kScoresPerGroup) * kListStride;
    }
    return __any_sync(kAllLanes, is_full);
  }

  // Moves the lists into the histograms. The whole warp.
  __device__ __forceinline__ void flush() {
    const int lane = lane_id();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t* s_row = s_histogram + row_in_warp(lane, r) * Config::kRowWords;

      // The row's new maximum, over the quad. NaN counts as +inf: such a row has no tau.
      float batch_max = row_max[r];
#pragma unroll 1  // the flush is inlined in several places: small before fast
      for (int hit = list_begin(r); hit < list_end[r]; hit += kListStride) {
        const float score = s_hits[hit];
        batch_max = score < INFINITY ? fmaxf(batch_max, score) : INFINITY;
      }
      batch_max = quad_max(batch_max);

      if (batch_max == INFINITY) {
        row_max[r] = threshold[r] = INFINITY;
      } else if (batch_max > row_max[r]) {
        // The window climbs: the slots it enters still hold bins that have fallen out of it below.
        if (row_max[r] > -INFINITY) {
          const HistogramGrid grid(batch_max, to_z);
          const int num_stale = grid.num_stale_slots(HistogramGrid(row_max[r], to_z));
          for (int i = lane % 4; i < num_stale; i += 4) {
            uint32_t* s_bin = s_row + HistogramGrid::slot_of(grid.top_bin - i) * kBinWords;
            for (int word = 0; word < kBinWords; ++word) s_bin[word] = 0;
          }
        }
        row_max[r] = batch_max;
        raise_threshold_to_window(r, batch_max);
      }
    }
    __syncwarp();

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t* s_row = s_histogram + row_in_warp(lane, r) * Config::kRowWords;
      const HistogramGrid grid(row_max[r], to_z);
#pragma unroll 1  // the flush is inlined in several places: small before fast
      for (int hit = list_begin(r); hit < list_end[r]; hit += kListStride) {
        const float score = s_hits[hit];
        if (!(score > threshold[r])) continue;
        const uint32_t code = grid.encode(score);
        const uint32_t bin = HistogramGrid::bin_of(code), quantum = HistogramGrid::quantum_of(code);
        if (grid.is_below_window(bin)) continue;
        uint32_t* s_bin = s_row + HistogramGrid::slot_of(bin) * kBinWords;
        atomicAdd(s_bin, 1u);
        atomicAdd(s_bin + 1, quantum);
        atomicAdd(s_bin + 2, quantum * quantum >> kQuantumBits);
      }
      list_end[r] = list_begin(r);
    }
    __syncwarp();
  }

  // Remembers the thresholds. A quad's lanes hold the same ones; one of them writes. The whole warp.
  __device__ __forceinline__ void take_snapshot(int index) {
    const int lane = lane_id();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (lane % 4 == 0) s_snapshots[index * Config::kRowsPerWarp + row_in_warp(lane, r)] = threshold[r];
    }
    __syncwarp();
  }

  __device__ __forceinline__ float above_snapshot(int index, int r, float score) const {
    return (score - s_snapshots[index * Config::kRowsPerWarp + row_in_warp(lane_id(), r)]) * to_z;
  }

  // The most by which a score of row group i exceeds its snapshot, given the maxima of the lane's rows.
  __device__ __forceinline__ float excess(int index, int i, const float (&tile_max)[kRows]) const {
    const float most =
        fmaxf(above_snapshot(index, 2 * i, tile_max[2 * i]), above_snapshot(index, 2 * i + 1, tile_max[2 * i + 1]));
    return warp_max_of_positive(fmaxf(most, 0.0f));
  }

  // The least by which a threshold of row group i has risen since the snapshot; rows that had none do not count.
  __device__ __forceinline__ float rise(int index, int i) const {
    const float least =
        fminf(above_snapshot(index, 2 * i, threshold[2 * i]), above_snapshot(index, 2 * i + 1, threshold[2 * i + 1]));
    return warp_min_of_positive(fmaxf(fminf(least, INFINITY), 0.0f));
  }

  // Lane l solves row l of the warp and takes what it needs from the lane that keeps the row. The whole warp, flushed.
  __device__ __forceinline__ TauBound solve() {
    const int lane = lane_id();
    float my_row_max = -INFINITY;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float value = __shfl_sync(kAllLanes, row_max[r], lane % 8 * 4);
      if (lane / 8 == r) my_row_max = value;
    }
    TauBound bound{-INFINITY, 0.0f, 0.0f};
    if (fabsf(my_row_max) < INFINITY) {
      const uint32_t* s_row = s_histogram + lane * Config::kRowWords;
      bound = adasplash2::solve(HistogramGrid(my_row_max, to_z), entmax, [s_row](uint32_t slot) {
        const uint32_t* s_bin = s_row + slot * kBinWords;
        return Bin{s_bin[0], s_bin[1], s_bin[2]};
      });
    } else if (my_row_max > 0.0f) {
      bound.tau_lower = NAN;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float tau_lower = __shfl_sync(kAllLanes, bound.tau_lower, row_in_warp(lane, r));
      if (tau_lower > -INFINITY) raise_threshold(r, tau_lower);
    }
    return bound;
  }
};

// Solving after tiles 1, 2, 4, 8, 16, 32, 48, ... lets through within 15% of the hits of solving after each.
__device__ __forceinline__ bool is_time_to_solve(int num_tiles_done) {
  return num_tiles_done < 16 ? (num_tiles_done & (num_tiles_done - 1)) == 0 : num_tiles_done % 16 == 0;
}

// NOTE: masks have an instance of their own: reading them takes registers that the others have no room for.
template <typename Element, int kHeadDim, AlphaKind kKind, bool kHasMask>
__global__ void __launch_bounds__(ScanConfig<kTileCols<Element, kHeadDim>>::kThreads, kMinBlocksPerSm)
    scan_kernel(const ScanParams params) {
  constexpr int kCols = kTileCols<Element, kHeadDim>;
  using Config = ScanConfig<kCols>;
  constexpr int kFragmentsM = Config::kRowsPerWarp / kMmaM;
  constexpr int kFragmentsN = Config::kBlockN / kMmaN;
  constexpr int kStageBytes = Config::kBlockN * kCols * 2;

  const AttentionProblem& problem = params.problem;
  const int batch = blockIdx.z, head = blockIdx.y;
  const int m_block = problem.is_causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int kv_head = kv_head_of(head, problem.num_heads, problem.num_kv_heads);
  const int warp = warp_id(), lane = lane_id();
  const int row_begin = m_block * Config::kBlockM, warp_row = row_begin + warp * Config::kRowsPerWarp;

  const WorkRange range = work_range(problem, batch);
  const int num_queries = range.num_queries, head_dim = static_cast<int>(problem.head_dim);
  const int key_end = range.max_visible_keys(row_begin, row_begin + Config::kBlockM);
  const int num_tiles = ceil_div(key_end, Config::kBlockN);
  const Element* g_query = head_rows<const Element>(problem.query, batch, head);
  const Element* g_key = head_rows<const Element>(problem.key, batch, kv_head);

  // Shared memory: key ring | histograms | hits | snapshots.
  uint8_t* smem = dynamic_smem();
  const uint32_t s_key = ptx::shared_address(smem);
  uint32_t* s_histograms = reinterpret_cast<uint32_t*>(smem + Config::kKeyBytes);
  float* s_hits = reinterpret_cast<float*>(smem + Config::kKeyBytes + Config::kHistogramBytes);
  float* s_snapshots = reinterpret_cast<float*>(smem + Config::kKeyBytes + Config::kHistogramBytes + Config::kHitBytes);

  // Phase 1: the queries pass through the key ring into registers, where they stay.
  copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(s_key, g_query, problem.query.stride_row, row_begin,
                                                            num_queries, head_dim);
  ptx::cp_async_commit();

  const float alpha = head_alpha(problem, batch, head);
  RowBounds<kCols, kKind> bounds;
  const float scale = score_scale(problem);
  bounds.init(warp, s_histograms, s_hits, s_snapshots, (alpha - 1.0f) * fabsf(scale), alpha);
  int visible[Config::kRowsPerLane];  // keys that the row sees
#pragma unroll
  for (int r = 0; r < Config::kRowsPerLane; ++r) {
    visible[r] = range.num_visible_keys(warp_row + bounds.row_in_warp(lane, r));
    if (visible[r] == 0) bounds.threshold[r] = INFINITY;
  }
  // Rows without keys take no hits whatever their scores, so only the first row that has some bounds the unmasked part.
  const int first_live_row = max(warp_row, range.first_row_of(0));
  const int unmasked_end = range.num_visible_keys(first_live_row);

  ptx::cp_async_wait<0>();
  __syncthreads();
  RowFragments<kCols> query[kFragmentsM];
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) query[i].load(s_key, warp * Config::kRowsPerWarp + i * kMmaM);
  __syncthreads();
  if (scale < 0.0f) {  // scores must grow with z
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) query[i].template negate<Element>();
  }

  const auto copy_keys = [&](int step, int stage) {
    if (step < num_tiles) {
      copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(
          s_key + stage * kStageBytes, g_key, problem.key.stride_row, (num_tiles - 1 - step) * Config::kBlockN, key_end,
          head_dim);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < Config::kStages - 1; ++step) copy_keys(step, step);

  // This warp's rows of the mask and of the excesses; a word is written when its tile 0 is done.
  const BlockMaskShape mask_shape(num_queries, range.num_keys);
  const int first_group = warp_row / kMaskRows;
  const int64_t head_index = batch * problem.num_heads + head;
  uint32_t* g_mask = params.block_mask + head_index * mask_shape.row_words();
  uint16_t* g_excess = params.tile_excess + head_index * mask_shape.num_row_groups * mask_shape.num_key_tiles;
  uint32_t mask_bits[kFragmentsM] = {};
  const auto mask_at = [&](int i, int word) {
    return g_mask + int64_t(first_group + i) * mask_shape.key_words() + word;
  };
  const auto excess_at = [&](int i, int tile) {
    return g_excess + int64_t(first_group + i) * mask_shape.num_key_tiles + tile;
  };
  const auto is_group_there = [&](int i) { return first_group + i < mask_shape.num_row_groups; };
  const auto store_mask_word = [&](int word) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
      if (lane == 0 && is_group_there(i)) *mask_at(i, word) = mask_bits[i];
      mask_bits[i] = 0;
    }
  };
  for (int word = mask_shape.key_words() - 1; word > mask_word(num_tiles - 1); --word) store_mask_word(word);

  int stage = 0;
  for (int step = 0; step < num_tiles; ++step) {
    const int tile = num_tiles - 1 - step;

    // Phase 2: wait for the tile; the stage that the barrier frees takes the next one.
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();
    copy_keys(step + Config::kStages - 1, stage == 0 ? Config::kStages - 1 : stage - 1);

    // Phase 3: scores.
    float score[kFragmentsM][kFragmentsN][4];
    const uint32_t s_tile = s_key + stage * kStageBytes;
    stage = stage == Config::kStages - 1 ? 0 : stage + 1;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) clear(score[i]);
    for_each_terms<Element>([&](auto terms) {
      constexpr Terms kTerms = decltype(terms)::value;
#pragma unroll
      for (int k = 0; k < kStepsOf<Element, kCols>; ++k) {
        if constexpr (std::is_same_v<Element, float>) __syncwarp();  // see multiply_transposed()
        MmaOperand<Element> a[kFragmentsM];
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) a[i] = operand_a<Element, kTerms>(query[i], k);
#pragma unroll
        for (int n = 0; n < kFragmentsN; n += 2) {
          if constexpr (std::is_same_v<Element, float>) __syncwarp();
          const auto b = operand_b<Element, kTerms, kCols>(s_tile, n * kMmaN, k);
#pragma unroll
          for (int i = 0; i < kFragmentsM; ++i) {
            multiply_add<kTerms>(score[i][n], a[i], b, 0);
            multiply_add<kTerms>(score[i][n + 1], a[i], b, 1);
          }
        }
      }
    });

    // Phase 4: keys that a row does not see score -inf; looked for in tiles at an edge only, and in masks.
    const int key_begin = tile * Config::kBlockN;
    if (key_begin + Config::kBlockN > unmasked_end) {
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int col = key_begin + n * kMmaN + accumulator_col(lane, e % 2);
            if (col >= visible[2 * i + e / 2]) score[i][n][e] = -INFINITY;
          }
        }
      }
    }

    if constexpr (kHasMask) {
      const ScoreMask<Element> mask(problem.mask, batch, head, fabsf(scale));
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        mask.apply_to(score[i], warp_row + i * kMmaM, key_begin, visible[2 * i], visible[2 * i + 1]);
      }
    }

    // Phase 5: the rows' maxima over this lane's columns, NaN if a score is. Those of the first tile are first bounds.
    float tile_max[Config::kRowsPerLane];
#pragma unroll
    for (int r = 0; r < Config::kRowsPerLane; ++r) {
      tile_max[r] = score[r / 2][0][2 * (r % 2)];
#pragma unroll
      for (int n = 0; n < kFragmentsN; ++n) {
        if (n > 0) tile_max[r] = ptx::max_nan(tile_max[r], score[r / 2][n][2 * (r % 2)]);
        tile_max[r] = ptx::max_nan(tile_max[r], score[r / 2][n][2 * (r % 2) + 1]);
      }
    }
    if (step == 0) {
#pragma unroll
      for (int r = 0; r < Config::kRowsPerLane; ++r) {
        const float row_max = quad_max(tile_max[r]);
        if (fabsf(row_max) < INFINITY) bounds.raise_threshold_to_window(r, row_max);
      }
      bounds.take_snapshot(0);
    }

    // Phase 6: has any row group a hit? Then its tile is live, and the hits join the lists.
    bool is_live = false;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
      const bool has_hit = bounds.is_hit(2 * i, tile_max[2 * i]) || bounds.is_hit(2 * i + 1, tile_max[2 * i + 1]);
      if (!__any_sync(kAllLanes, has_hit)) continue;
      is_live = true;
      mask_bits[i] |= mask_bit(tile);
      const float excess = bounds.excess(snapshot_of(step), i, tile_max);
      if (lane == 0 && is_group_there(i)) *excess_at(i, tile) = encode_excess(excess);
    }
    if (is_live) {
#pragma unroll
      for (int n = 0; n < kFragmentsN; n += 2) {
        if (bounds.may_overflow()) bounds.flush();
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            bounds.append(2 * i + e / 2, score[i][n][e]);
            bounds.append(2 * i + e / 2, score[i][n + 1][e]);
          }
        }
      }
    }
    if (tile % 32 == 0) store_mask_word(mask_word(tile));

    // Phase 7, now and then: better bounds. After the last tile the result.
    if (is_time_to_solve(step + 1) && step + 1 < num_tiles) {
      bounds.flush();
      bounds.solve();
      if (((step + 1) & step) == 0) bounds.take_snapshot(snapshot_of(step + 1));
    }
  }

  // Phase 8: the result, a lane a row.
  bounds.flush();
  const TauBound bound = bounds.solve();
  const int row = warp_row + lane;
  if (lane < Config::kRowsPerWarp && row < num_queries) {
    const int64_t index = row_index(problem, batch, head, row);
    const bool has_keys = range.num_visible_keys(row) > 0 && bound.tau_lower != -INFINITY;
    params.tau_lower[index] = has_keys ? bound.tau_lower : INFINITY;
    params.is_coarse[index] = bound.needs_refinement();
  }

  // Phase 9: tiles whose scores have all fallen below the final thresholds leave the mask. Lane l keeps the rises since
  // snapshot l, then looks at tile l of each word.
  const int num_snapshots = num_tiles > 0 ? snapshot_of(num_tiles - 1) + 1 : 0;
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
    if (!is_group_there(i)) continue;
    float rise_since = 0.0f;
    for (int index = 0; index < num_snapshots; ++index) {
      const float rise = bounds.rise(index, i);
      if (lane == index) rise_since = rise;
    }
    for (int word = 0; word <= mask_word(num_tiles - 1); ++word) {
      const uint32_t marked = *mask_at(i, word);
      const int tile = word * 32 + lane;
      const bool is_marked = (marked & mask_bit(lane)) != 0;
      const float rise = __shfl_sync(kAllLanes, rise_since, is_marked ? snapshot_of(num_tiles - 1 - tile) : 0);
      const bool is_live = is_marked && decode_excess(*excess_at(i, tile)) >= rise;
      const uint32_t live = __ballot_sync(kAllLanes, is_live);
      if (lane == 0) *mask_at(i, word) = live;
    }
  }
}

}  // namespace adasplash2::cuda
