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

#include <climits>
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
#include "math/norm_line.h"

namespace adasplash2::cuda {

// Solving after tiles 1, 2, 4, 8, 16, 32, 48, ... lets through within 15% of the hits of solving after each.
constexpr int kMostTilesUnsolved = 16;
__device__ __forceinline__ bool is_time_to_solve(int num_tiles_done) {
  return num_tiles_done < kMostTilesUnsolved ? (num_tiles_done & (num_tiles_done - 1)) == 0
                                             : num_tiles_done % kMostTilesUnsolved == 0;
}

// What a warp knows of its rows so far. A lane keeps the rows of its quad, kRowsPerLane of them, in registers; their
// histograms and the lists of hits that have yet to enter them are in shared memory.
//
// A list holds the lower 16 bits of the hits' codes on the grid: 9 of the position in its bin, 7 of the bin. That tells
// bins apart within 4 units of z, so a hit that lies more than kUnitsInLists above the threshold is not put there
// before a flush has raised the threshold; and where the maximum has climbed another unit, none of the list is in the
// window.
//
// A warp whose rows keep more than kDenseShare of their keys leaves the histogram for good: f and A of all scores at
// one point cost a score what the lists cost it, and nothing more (docs/algorithm.md, "Bounds without a histogram").
template <int kHeadDim, AlphaKind kKind>
struct RowBounds {
  using Config = ScanConfig<kHeadDim>;
  static constexpr int kRows = Config::kRowsPerLane;
  static constexpr int kListStride = kWarpSize;  // entry e of all lanes side by side: no bank conflict
  static constexpr int kListSize = Config::kHitsPerList * kListStride;
  static constexpr float kUnitsInLists = 3.0f;
  static constexpr uint32_t kListBins = 1u << (16 - kPackedQuantumBits);
  static_assert((kUnitsInLists + 1.0f) * kBinsPerUnit + 2 < kListBins, "bins of a list must not be mistaken");

  uint32_t* s_histogram;  // [kRowsPerWarp][kRowWords], this warp's rows; the last word is the maximum at the last flush
  uint32_t* s_row;        // this lane's first row of it, the others lie 8 rows apart
  uint16_t* s_hits;       // [kWarps][kRows][kHitsPerList][kWarpSize], all warps': an index alone is then an address
  uint16_t* s_snapshots;  // [kSnapshots][kRowsPerWarp], thresholds as they were, the upper halves
  float to_z, from_z;
  Entmax<kKind> entmax;

  float lane_max[kRows];   // of the scores that this lane has seen, NaN if one is; from a flush on the row's
  float threshold[kRows];  // in units of the score: at or below tau, so only scores above it can matter
  float origin[kRows];     // base of the row's grid at the last flush; dense: the point of the sums, in units of z
  int first_list;          // index in s_hits of this lane's first list
  int list_end[kRows];     // and of the end of what is in each, less r * kListSize
  int num_hits = 0;        // that this lane has flushed since the last solve

  bool is_dense = false;  // then the lists' place holds sums over the lane's columns, [kRows][2][kWarpSize]
  static_assert(kListSize * 2 >= int(sizeof(TailSums)) * kWarpSize, "a row's sums must fit into its lists");

  __device__ __forceinline__ void init(int warp, uint32_t* s_histograms, uint16_t* s_all_hits,
                                       uint16_t* s_all_snapshots, float to_z_, float alpha) {
    s_histogram = s_histograms + warp * Config::kRowsPerWarp * Config::kRowWords;
    s_row = s_histogram + row_in_warp(lane_id(), 0) * Config::kRowWords;
    s_hits = s_all_hits;
    first_list = warp * kRows * kListSize + lane_id();
    s_snapshots = s_all_snapshots + warp * Config::kSnapshots * Config::kRowsPerWarp;
    to_z = to_z_;
    from_z = 1.0f / to_z_;
    entmax.alpha = alpha;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      lane_max[r] = threshold[r] = -INFINITY;
      origin[r] = 0.0f;
      list_end[r] = first_list;
    }
    for (int i = lane_id(); i < Config::kRowsPerWarp * Config::kRowWords; i += kWarpSize) s_histogram[i] = 0;
    __syncwarp();
    if (lane_id() < Config::kRowsPerWarp) row_max_at_flush(lane_id()) = __float_as_uint(-INFINITY);
    __syncwarp();
  }

  // One of the two sums of this lane's columns of a row.
  __device__ __forceinline__ float& sum_at(int r, int which) const {
    return reinterpret_cast<float*>(s_hits + first_list - lane_id() + r * kListSize)[which * kWarpSize + lane_id()];
  }
  __device__ __forceinline__ TailSums load_sums(int r) const { return {sum_at(r, 0), sum_at(r, 1)}; }
  __device__ __forceinline__ void store_sums(int r, const TailSums& sums) const {
    sum_at(r, 0) = sums.prob;
    sum_at(r, 1) = sums.weight;
  }

  static __device__ __forceinline__ int row_in_warp(int lane, int r) { return lane / 4 + 8 * r; }

  // NOTE: what depends on r is a constant added last, here and in lists: an offset in the instruction, not a register.
  __device__ __forceinline__ uint32_t* bin_at(int r, uint32_t slot) const {
    return s_row + slot * kPackedBinWords + 8 * r * Config::kRowWords;
  }
  __device__ __forceinline__ uint16_t& hit_at(int r, int index) const { return (s_hits + index)[r * kListSize]; }

  // Its bits: +inf once a score of the row is NaN or +inf.
  __device__ __forceinline__ uint32_t& row_max_at_flush(int row) const {
    return s_histogram[row * Config::kRowWords + Config::kRowWords - 1];
  }

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

  __device__ __forceinline__ void see(int r, float score) { lane_max[r] = ptx::max_nan(lane_max[r], score); }

  __device__ __forceinline__ void append(int r, float score) {
    if (is_hit(r, score)) {
      const float score_to_quanta = to_z * (kBinsPerUnit * PackedHistogramGrid::kGridQuanta);
      hit_at(r, list_end[r]) = static_cast<uint16_t>(float_bits(floor_multiply_add(score, score_to_quanta, origin[r])));
      list_end[r] += kListStride;
    }
  }

  // Whether the hits of a step, of which the lane has seen the largest, have to wait for a flush.
  __device__ __forceinline__ bool needs_flush() const {
    int last_end = first_list;
    bool needs_it = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      last_end = max(last_end, list_end[r]);
      needs_it |= !(lane_max[r] <= threshold[r] + kUnitsInLists * from_z);
    }
    needs_it |= last_end - first_list > (Config::kHitsPerList - Config::kMostHitsPerStep) * kListStride;
    return __any_sync(kAllLanes, needs_it);
  }

  // The row's maximum so far, over the quad; +inf for a row with a NaN, which has no tau.
  __device__ __forceinline__ float quad_row_max(int r) const {
    return quad_max(lane_max[r] < INFINITY ? lane_max[r] : INFINITY);
  }

  // Moves the lists into the histograms. The whole warp.
  __device__ __forceinline__ void flush() {
    const int lane = lane_id();
    uint32_t top_bin[kRows];
    int longest = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float row_max = quad_row_max(r);
      const float old_max = __uint_as_float(row_max_at_flush(row_in_warp(lane, r)));
      const PackedHistogramGrid grid(row_max, to_z);
      top_bin[r] = grid.top_bin;
      origin[r] = grid.base;
      if (row_max == INFINITY) {
        threshold[r] = INFINITY;
      } else if (row_max > old_max) {
        if (row_max > threshold[r] + (kUnitsInLists + 1.0f) * from_z) list_end[r] = first_list;
        // The window climbs: the slots it enters still hold bins that have fallen out of it below.
        if (old_max > -INFINITY) {
          const int num_stale = grid.num_stale_slots(PackedHistogramGrid(old_max, to_z));
#pragma unroll 1  // rare: small before fast
          for (int i = lane % 4; i < num_stale; i += 4) {
            uint32_t* s_bin = bin_at(r, PackedHistogramGrid::slot_of(grid.top_bin - i));
            s_bin[0] = s_bin[1] = 0;
          }
        }
        raise_threshold_to_window(r, row_max);
      }
      lane_max[r] = row_max;
      const int length = (list_end[r] - first_list) / kListStride;
      longest = max(longest, length);
      num_hits += length;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (lane % 4 == 0) row_max_at_flush(row_in_warp(lane, r)) = __float_as_uint(lane_max[r]);
    }

    // All rows at a time: their loads and atomics wait side by side.
    longest = __reduce_max_sync(kAllLanes, longest);
    for (int entry = 0; entry < longest; ++entry) {
      uint32_t code[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int hit = first_list + entry * kListStride;
        code[r] = hit < list_end[r] ? hit_at(r, hit) : kNoCode;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t bin = PackedHistogramGrid::bin_of(code[r]);
        if (code[r] == kNoCode || (top_bin[r] - bin) % kListBins >= kNumSlots) continue;
        const PackedBin one = PackedBin::of(PackedHistogramGrid::quantum_of(code[r]));
        uint32_t* s_bin = bin_at(r, PackedHistogramGrid::slot_of(bin));
        atomicAdd(s_bin, one.count_and_sum);
        atomicAdd(s_bin + 1, one.sum_squares);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) list_end[r] = first_list;
    __syncwarp();
  }

  // Remembers the thresholds. A quad's lanes hold the same ones; one of them writes. The whole warp.
  __device__ __forceinline__ void take_snapshot(int index) {
    const int lane = lane_id();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (lane % 4 == 0) {
        s_snapshots[index * Config::kRowsPerWarp + row_in_warp(lane, r)] =
            static_cast<uint16_t>(__float_as_uint(threshold[r]) >> 16);
      }
    }
    __syncwarp();
  }

  // What a score is measured against need not be the threshold to the last bit, only always the same number.
  __device__ __forceinline__ float above_snapshot(int index, int r, float score) const {
    const uint32_t upper = s_snapshots[index * Config::kRowsPerWarp + row_in_warp(lane_id(), r)];
    return (score - __uint_as_float(upper << 16)) * to_z;
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
  // A warp whose hits since the last solve are a large share of `num_scores`, or that has a bin which may overflow
  // before the next solve, turns dense.
  __device__ __forceinline__ TauBound solve(int num_scores) {
    const int lane = lane_id();
    const float row_max = lane < Config::kRowsPerWarp ? __uint_as_float(row_max_at_flush(lane)) : -INFINITY;
    TauBound bound{-INFINITY, 0.0f, 0.0f};
    uint32_t fullest = 0;
    if (fabsf(row_max) < INFINITY) {
      const uint32_t* s_lane_row = s_histogram + lane * Config::kRowWords;
      bound = adasplash2::solve(
          HistogramGrid(row_max, to_z), entmax,
          [&](uint32_t slot) {
            const uint32_t* s_bin = s_lane_row + slot * kPackedBinWords;
            const Bin bin = PackedBin{s_bin[0], s_bin[1]}.unpacked();
            fullest = bin.count > fullest ? bin.count : fullest;
            return bin;
          },
          1.0f / PackedHistogramGrid::kGridQuanta);
    } else if (row_max > 0.0f) {
      bound.tau_lower = NAN;
    }
    __syncwarp();
    const int hits = __reduce_add_sync(kAllLanes, num_hits);
    num_hits = 0;
    is_dense = hits > kDenseShare * num_scores || __any_sync(kAllLanes, fullest > kMaxCountAtSolve);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int source = row_in_warp(lane, r);
      const float tau_lower = __shfl_sync(kAllLanes, bound.tau_lower, source);
      if (tau_lower > -INFINITY) raise_threshold(r, tau_lower);
      if (!is_dense) continue;
      // What the histogram knew, as sums; once for the quad. Where no keys were there is nothing to sum yet.
      const float weight_sum = __shfl_sync(kAllLanes, bound.weight_sum, source);
      const bool has_keys = tau_lower > -INFINITY;
      origin[r] = has_keys ? tau_lower : INFINITY;
      store_sums(r, has_keys && lane % 4 == 0 ? TailSums{1.0f, weight_sum} : TailSums{});
    }
    return bound;
  }

  // Dense: what thresholds and maxima say of tau in the end, in units of z. The whole warp.
  __device__ __forceinline__ float tau_lower(int r) const {
    return quad_row_max(r) == INFINITY ? NAN : round_below(threshold[r] * to_z);
  }

  // Dense: all scores of a row that this lane holds go into the sums.
  template <int kFragmentsN>
  __device__ __forceinline__ void add(int r, const float (&score)[kFragmentsN][4]) const {
    TailSums sums = load_sums(r);
#pragma unroll
    for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        const float gap = fmaxf(score[n][2 * (r % 2) + parity] * to_z - origin[r], 0.0f);
        const float weight = entmax.weight(gap);
        sums.prob += entmax.prob(gap, weight);
        sums.weight += weight;
      }
    }
    store_sums(r, sums);
  }

  // Dense: better thresholds, and the point of the sums where tau would be if the keys to come were like the `share`
  // seen.
  __device__ __forceinline__ void solve_sums(float share) {
    // Of up to 2^10 terms; their rounding must not lift the bound.
    constexpr float kMost = 1.0f + 0x1p-13f, kLeast = 1.0f - 0x1p-13f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float row_max = quad_row_max(r);
      const TailSums lane_sums = load_sums(r);
      TailSums sums = {quad_sum(lane_sums.prob) * kLeast, quad_sum(lane_sums.weight) * kMost};
      if (row_max == INFINITY) {
        threshold[r] = origin[r] = INFINITY;
      } else if (threshold[r] == -INFINITY && row_max > -INFINITY) {  // the row's first keys
        raise_threshold_to_window(r, row_max);
        origin[r] = threshold[r] * to_z;
      } else if (sums.prob > 0.0f) {
        const NormLine line = norm_line(entmax, sums);
        raise_threshold(r, round_below(origin[r] + line.step_to(1.0f)));
        const float point = fmaxf(origin[r] + line.step_to(entmax.norm(share)), threshold[r] * to_z);
        sums = moved(entmax, sums, point - origin[r]);
        origin[r] = point;
      }
      store_sums(r, lane_id() % 4 == 0 ? sums : TailSums{});
    }
  }

 private:
  static constexpr uint32_t kNoCode = 0xffffffffu;
  // From there on an output pass that refines costs less than the flushes.
  static constexpr float kDenseShare = 0.4f;
  // Keys between two solves: what may join a bin before it is looked at again.
  static constexpr uint32_t kMaxCountAtSolve = kMaxPackedCount - kMostTilesUnsolved * kMaskKeys;
};

// NOTE: masks have an instance of their own: reading them takes registers that the others have no room for.
template <typename Element, int kHeadDim, AlphaKind kKind, bool kHasMask>
__global__ void __launch_bounds__(ScanConfig<kTileCols<Element, kHeadDim>>::kThreads, kMinScanBlocks<Element, kHasMask>)
    scan_kernel(const ScanParams params) {
  constexpr int kCols = kTileCols<Element, kHeadDim>;
  using Config = ScanConfig<kCols>;
  constexpr int kFragmentsM = Config::kRowsPerWarp / kMmaM;
  constexpr int kKeysPerStep = Config::kKeysPerStep;
  constexpr int kFragmentsN = kKeysPerStep / kMmaN;
  constexpr int kStageBytes = Config::kBlockN * kCols * 2;
  constexpr float kLeastShare = 1.0f / 16.0f;  // to conclude from, on keys to come

  const AttentionProblem& problem = params.problem;
  const int batch = blockIdx.z, head = blockIdx.y;
  const int m_block = problem.is_causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int kv_head = kv_head_of(head, problem.num_heads, problem.num_kv_heads);
  const int warp = warp_id(), lane = lane_id();
  const int row_begin = m_block * Config::kBlockM, warp_row = row_begin + warp * Config::kRowsPerWarp;

  const WorkRange range = work_range(problem, batch);
  const int num_queries = range.num_queries, head_dim = static_cast<int>(problem.head_dim);
  const int key_end = range.max_visible_keys(row_begin, row_begin + Config::kBlockM);
  const int num_tiles = ceil_div(key_end, kMaskKeys);
  const auto* g_query = head_rows<const Stored<Element>>(problem.query, batch, head);
  const auto* g_key = head_rows<const Stored<Element>>(problem.key, batch, kv_head);

  // Shared memory: queries, if they stay there | key ring | histograms | hits | snapshots | keys that a row sees.
  uint8_t* smem = dynamic_smem();
  const uint32_t s_query = ptx::shared_address(smem), s_key = s_query + Config::kQueryBytes;
  uint8_t* s_lists = smem + Config::kQueryBytes + Config::kKeyBytes;
  uint32_t* s_histograms = reinterpret_cast<uint32_t*>(s_lists);
  uint16_t* s_hits = reinterpret_cast<uint16_t*>(s_lists + Config::kHistogramBytes);
  uint16_t* s_snapshots = reinterpret_cast<uint16_t*>(s_lists + Config::kHistogramBytes + Config::kHitBytes);
  int* s_visible = reinterpret_cast<int*>(smem + Config::kSmemBytes - Config::kVisibleBytes) +
                   warp * Config::kRowsPerWarp;  // this warp's rows

  // Phase 1: the queries pass through all of the shared memory into registers, where they stay, or stay there.
  copy_tile_async<Config::kBlockM, kCols, Config::kThreads>(s_query, g_query, problem.query.stride_row, row_begin,
                                                            num_queries, head_dim);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  const float scale = score_scale(problem);
  if (scale < 0.0f) {  // scores must grow with z
    constexpr uint32_t kSigns = 0x80008000u;
    for (int i = threadIdx.x; i < Config::kBlockM * kCols / 2; i += Config::kThreads) {
      reinterpret_cast<uint32_t*>(smem)[i] ^= kSigns;
    }
    __syncthreads();
  }
  std::conditional_t<Config::kQueryInRegisters, RowFragments<kCols>, RowFragmentsInSmem<kCols>> query[kFragmentsM];
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) query[i].load(s_query, warp * Config::kRowsPerWarp + i * kMmaM);
  __syncthreads();

  const auto copy_keys = [&](int key_begin, int stage) {
    if (key_begin >= 0) {
      copy_tile_async<Config::kBlockN, kCols, Config::kThreads>(s_key + stage * kStageBytes, g_key,
                                                                problem.key.stride_row, key_begin, key_end, head_dim);
    }
    ptx::cp_async_commit();
  };
  int stage_key = (ceil_div(key_end, Config::kBlockN) - 1) * Config::kBlockN;
#pragma unroll
  for (int stage = 0; stage < Config::kStages - 1; ++stage) copy_keys(stage_key - stage * Config::kBlockN, stage);

  const float alpha = head_alpha(problem, batch, head);
  RowBounds<kCols, kKind> bounds;
  bounds.init(warp, s_histograms, s_hits, s_snapshots, (alpha - 1.0f) * fabsf(scale), alpha);
  if (lane < Config::kRowsPerWarp) s_visible[lane] = range.num_visible_keys(warp_row + lane);
  __syncwarp();
  const auto visible_keys = [&](int r) { return s_visible[bounds.row_in_warp(lane, r)]; };
#pragma unroll
  for (int r = 0; r < Config::kRowsPerLane; ++r) {
    if (visible_keys(r) == 0) bounds.threshold[r] = INFINITY;
  }
  // Rows without keys take no hits whatever their scores, so only the first row that has some bounds the unmasked part.
  const int first_live_row = max(warp_row, range.first_row_of(0));
  const int unmasked_end = range.num_visible_keys(first_live_row);

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

  const auto store_result = [&](int row_in_warp, float tau_lower, bool is_coarse) {
    const int row = warp_row + row_in_warp;
    if (row >= num_queries) return;
    const int64_t index = row_index(problem, batch, head, row);
    const bool has_keys = range.num_visible_keys(row) > 0 && tau_lower != -INFINITY;
    params.tau_lower[index] = has_keys ? tau_lower : INFINITY;
    params.is_coarse[index] = is_coarse;
  };
  if (num_tiles == 0 && lane < Config::kRowsPerWarp) store_result(lane, -INFINITY, false);

  // Earlier on thresholds are low, more so before the first of a few live tiles, and everything looks dense.
  const int first_dense_tile = max(8, num_tiles / 8);
  float tile_max[Config::kRowsPerLane];  // of the tile so far, over this lane's columns
#pragma unroll
  for (int r = 0; r < Config::kRowsPerLane; ++r) tile_max[r] = -INFINITY;
  bool is_first_step = true;
  for (int stage = 0; stage_key >= 0; stage_key -= Config::kBlockN) {
    const int tile = stage_key / kMaskKeys, tiles_before = num_tiles - 1 - tile;

    // Phase 2: wait for the keys; the stage that the barrier frees takes the next ones.
    if constexpr (Config::kStages > 1) {
      ptx::cp_async_wait<Config::kStages - 2>();
      __syncthreads();
      copy_keys(stage_key - (Config::kStages - 1) * Config::kBlockN, stage == 0 ? Config::kStages - 1 : stage - 1);
    } else {
      __syncthreads();
      copy_keys(stage_key, 0);
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    const uint32_t s_stage = s_key + stage * kStageBytes;
    stage = stage == Config::kStages - 1 ? 0 : stage + 1;

#pragma unroll 1
    for (int first_key = 0; first_key < Config::kBlockN; first_key += kKeysPerStep) {
      // Phase 3: scores.
      const int key_begin = stage_key + first_key;
      float score[kFragmentsM][kFragmentsN][4];
      const auto multiply = [&] { multiply_transposed<Element, kCols>(score, query, s_stage + first_key * kCols * 2); };
      if constexpr (kHasMask) {
        ScoreMask<Element>(problem.mask, batch, head, fabsf(scale))
            .multiply_masked(
                score, warp_row, key_begin, [&](int i, int half) { return visible_keys(2 * i + half); }, multiply);
      } else {
        multiply();
      }

      // Phase 4: keys that a row does not see score -inf; looked for at an edge only.
      if (key_begin + kKeysPerStep > unmasked_end) {
#pragma unroll
        for (int r = 0; r < Config::kRowsPerLane; ++r) {
          const int visible = visible_keys(r);
#pragma unroll
          for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
            for (int parity = 0; parity < 2; ++parity) {
              const int col = key_begin + n * kMmaN + accumulator_col(lane, parity);
              if (col >= visible) score[r / 2][n][2 * (r % 2) + parity] = -INFINITY;
            }
          }
        }
      }

      // Phase 5: the rows' maxima over this lane's columns, NaN if a score is. Has any row group a hit?
      float step_max[Config::kRowsPerLane];
#pragma unroll
      for (int r = 0; r < Config::kRowsPerLane; ++r) {
        step_max[r] = score[r / 2][0][2 * (r % 2)];
#pragma unroll
        for (int n = 0; n < kFragmentsN; ++n) {
          if (n > 0) step_max[r] = ptx::max_nan(step_max[r], score[r / 2][n][2 * (r % 2)]);
          step_max[r] = ptx::max_nan(step_max[r], score[r / 2][n][2 * (r % 2) + 1]);
        }
      }
      bool is_live[kFragmentsM], is_any_live = is_first_step;
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        is_live[i] = __any_sync(kAllLanes,
                                bounds.is_hit(2 * i, step_max[2 * i]) || bounds.is_hit(2 * i + 1, step_max[2 * i + 1]));
        is_any_live |= is_live[i];
      }
      if (!is_any_live) continue;

      // Phase 6: the hits join the lists, or all scores the sums.
#pragma unroll
      for (int r = 0; r < Config::kRowsPerLane; ++r) {
        bounds.see(r, step_max[r]);
        tile_max[r] = ptx::max_nan(tile_max[r], step_max[r]);
      }
      if (bounds.is_dense) {
#pragma unroll
        for (int r = 0; r < Config::kRowsPerLane; ++r) {
          if (is_live[r / 2]) bounds.add(r, score[r / 2]);
        }
      } else {
        if (bounds.needs_flush()) bounds.flush();
        if (is_first_step) bounds.take_snapshot(0);
        is_first_step = false;
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
          if (!is_live[i]) continue;
#pragma unroll
          for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) bounds.append(2 * i + e / 2, score[i][n][e]);
          }
        }
      }
    }
    if (stage_key % kMaskKeys != 0) continue;

    // Phase 7: the tile is done. It is live for the row groups that have a hit in it.
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
      if (__any_sync(kAllLanes,
                     bounds.is_hit(2 * i, tile_max[2 * i]) || bounds.is_hit(2 * i + 1, tile_max[2 * i + 1]))) {
        mask_bits[i] |= mask_bit(tile);
        const float excess = bounds.excess(snapshot_of(tiles_before), i, tile_max);
        if (lane == 0 && is_group_there(i)) *excess_at(i, tile) = encode_excess(excess);
      }
      tile_max[2 * i] = tile_max[2 * i + 1] = -INFINITY;
    }
    if (tile % 32 == 0) store_mask_word(mask_word(tile));

    // Phase 8, now and then: better bounds. After the last tile the result, from sums a quad a row, else a lane a row.
    const int tiles_done = tiles_before + 1;
    const bool is_last = tile == 0;
    if (!is_time_to_solve(tiles_done) && !is_last) continue;
    if (bounds.is_dense) {
      bounds.solve_sums(fmaxf(static_cast<float>(tiles_done) / static_cast<float>(num_tiles), kLeastShare));
#pragma unroll
      for (int r = 0; r < Config::kRowsPerLane; ++r) {
        const float tau_lower = bounds.tau_lower(r);
        if (is_last && lane % 4 == 0) store_result(bounds.row_in_warp(lane, r), tau_lower, true);
      }
    } else {
      bounds.flush();
      const int tiles_since = min(tiles_done / 2, kMostTilesUnsolved);
      const TauBound bound = bounds.solve(
          tiles_done < first_dense_tile || is_last ? INT_MAX : tiles_since * kMaskKeys * Config::kRowsPerWarp);
      if (is_last && lane < Config::kRowsPerWarp) store_result(lane, bound.tau_lower, bound.needs_refinement());
    }
    if ((tiles_done & (tiles_done - 1)) == 0 && !is_last) bounds.take_snapshot(snapshot_of(tiles_done));
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
