// Pass A, the scan, on Hopper: one dense pass over the keys by wgmma, TMA and specialised warps (docs/kernels.md,
// "Scan (sm90)").
//
//   in   query (B, H, Nq, D), key (B, Hkv, Nk, D)
//   out  tau_lower (B, H, Nq) float, in units of z; +inf for a row without keys, NaN for a row with a NaN or +inf score
//        is_coarse (B, H, Nq) uint8, not 0 for any row with a tau: all of these bounds are refined (math/refinement.h)
//        block_mask (rows, see block_mask.h): 0 where no score of the tile exceeds a lower bound of its row's tau
//   own  tile_excess (B, H, row groups, key tiles) uint16
//
// Blocks stay, and take blocks of kBlockM rows of a head one after the other (work_queue.cuh). One warp brings their
// queries and keeps a ring of key tiles full; each of three warpgroups owns 64 rows, whose queries stay in registers. A
// warp owns 16 rows, one group of the mask, and meets the others at the ring only.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <dynamic_smem.cuh>

#include "cuda/config.h"
#include "cuda/pass_params.h"
#include "cuda/problem.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/max.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/sm90/query_block.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/smem_tile.cuh"
#include "cuda/sm90/warpgroup.cuh"
#include "cuda/sm90/work_queue.cuh"
#include "cuda/tile/half_sums.cuh"
#include "cuda/tile/row_reduce.cuh"
#include "cuda/tile/tile_excess.cuh"
#include "math/block_mask.h"
#include "math/norm_line.h"
#include "math/refinement.h"

namespace adasplash2::cuda::sm90 {

template <int kHeadDim>
struct ScanConfig {
  static constexpr int kConsumers = 3;  // warpgroups
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
  static constexpr int kBlockM = kConsumers * kWgmmaM;
  static constexpr int kBlockN = 128;
  static constexpr int kMaskTiles = kBlockN / kMaskKeys;
  static constexpr int kStages = kHeadDim <= 64 ? 6 : 4;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kConsumerRegisters = 160;

  static constexpr int kRowsPerWarp = kMaskRows;
  static constexpr int kRowsPerLane = 2;
  // Thresholds are remembered before the first tile and after tiles 1, 2, 4, 8, ...
  static constexpr int kSnapshots = 14;
  static_assert(kMaxKeys / kBlockN <= int64_t(1) << (kSnapshots - 1), "the last tile needs a snapshot before it");

  using KeyTile = SmemTile<kBlockN, kHeadDim>;
  using QueryTile = SmemTile<kWgmmaM, kHeadDim>;

  // Of keys that a row of the block may see.
  static __device__ __forceinline__ int num_tiles(const QueryBlock<kBlockM>& block) {
    return ceil_div(block.num_visible_keys(), kBlockN);
  }

  // Shared memory: key ring | queries | snapshots | barriers of the ring | item.
  static constexpr int kQueryOffset = kStages * KeyTile::kBytes;
  static constexpr int kSnapshotOffset = kQueryOffset + kConsumers * QueryTile::kBytes;
  static constexpr int kBarrierOffset = kSnapshotOffset + kSnapshots * kBlockM * 4;
  static constexpr int kItemOffset = kBarrierOffset + Ring<kStages>::kBarrierBytes;
  static constexpr int kSmemBytes = kItemOffset + ItemSlots<1>::kSmemBytes;
  static_assert(kBarrierOffset % 8 == 0, "mbarriers are 8-byte aligned");
};

struct ScanWithMaps {
  TensorMap query;  // boxes of 64 rows
  TensorMap key;    // boxes of kBlockN rows
  ScanParams pass;
  WorkQueue queue;
};

// The larger one as signed integers: for float bits the larger number where one of them is not negative; the
// canonical NaN is larger than all.
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

// The scores of 16 rows and kBlockN keys: of a lane, 2 rows.
template <int kHeadDim>
using ScoreTile = float[ScanConfig<kHeadDim>::kBlockN / 2];

// The maxima of a lane's rows over its columns in the mask tiles of a key tile.
template <int kHeadDim>
using TileMaxima = float[ScanConfig<kHeadDim>::kMaskTiles][ScanConfig<kHeadDim>::kRowsPerLane];

// What a warp knows of its 16 rows so far. A lane keeps the two rows of its quad; `sums` are of the keys in its own
// columns, the rest is the same in the four lanes.
template <int kHeadDim, AlphaKind kKind>
struct RowBounds {
  using Config = ScanConfig<kHeadDim>;
  static constexpr int kRows = Config::kRowsPerLane;

  float* s_snapshots;  // [kSnapshots][kRowsPerWarp], thresholds as they were
  float to_z, from_z;
  Entmax<kKind> entmax;

  float threshold[kRows];  // in units of the score: at or below tau, so only scores above it can matter; +inf: none can
  int bits_bound[kRows];   // float bits below it are at or below the threshold; INT_MIN for a negative threshold
  float point[kRows];      // z where the sums are taken: near the tau that is expected; -inf before the first key
  TailSums sums[kRows];    // certain: what the moves of the point have left of them
  // Where alpha = 1.5, whose refinement starts from an estimate: what should be there beside them, sign included.
  TailSums unproven[kRows];
  static constexpr bool kEstimates = kKind == AlphaKind::kOneAndHalf;
  int num_full_tiles = 0;  // in a row, up to the last one, that had hits in all their mask tiles

  __device__ __forceinline__ void init(float* s_snapshots_, float to_z_, float alpha) {
    s_snapshots = s_snapshots_;
    to_z = to_z_;
    from_z = 1.0f / to_z_;
    entmax.alpha = alpha;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      set_threshold(r, -INFINITY);
      point[r] = -INFINITY;
    }
  }

  static __device__ __forceinline__ int row_in_warp(int lane, int r) { return lane / 4 + 8 * r; }

  __device__ __forceinline__ void set_threshold(int r, float value) {
    threshold[r] = value;
    bits_bound[r] = value >= 0.0f ? __float_as_int(fabsf(value)) + 1 : INT_MIN;
  }
  // No key can matter to the row any more: it has none, or a score that is NaN or +inf.
  __device__ __forceinline__ void close(int r) {
    set_threshold(r, INFINITY);
    point[r] = INFINITY;
    sums[r] = unproven[r] = {};
  }
  // To the largest score that is certainly at or below a bound.
  __device__ __forceinline__ void raise_threshold(int r, float bound) {
    const float score = round_below(bound) * from_z;
    set_threshold(r, fmaxf(threshold[r], score - fabsf(score) * 0x1p-22f));
  }

  // A NaN is a hit: it must be seen.
  __device__ __forceinline__ bool is_hit(int r, float score) const { return !(score <= threshold[r]); }
  // May a score with these bits be a hit? Exact where the threshold is not negative, always true where it is.
  __device__ __forceinline__ bool may_be_hit(int r, int bits) const { return bits >= bits_bound[r]; }

  // Takes what is certain along; unproven is then of the point before.
  __device__ __forceinline__ void move_certain(int r, float new_point) {
    sums[r] = moved(entmax, sums[r], new_point - point[r]);
    point[r] = new_point;
  }
  __device__ __forceinline__ TailSums likely(int r) const {
    return {sums[r].prob + unproven[r].prob, sums[r].weight + unproven[r].weight};
  }
  // After moves from old_point, where `likely_there` was likely.
  __device__ __forceinline__ void move_unproven(int r, const TailSums& likely_there, float old_point) {
    if constexpr (kEstimates) {
      const TailSums likely_here = expected(entmax, likely_there, point[r] - old_point);
      unproven[r] = {likely_here.prob - sums[r].prob, likely_here.weight - sums[r].weight};
    }
  }
  __device__ __forceinline__ void move(int r, float new_point) {
    const TailSums likely_there = likely(r);
    const float old_point = point[r];
    move_certain(r, new_point);
    move_unproven(r, likely_there, old_point);
  }

  // The sums of lane and tile columns [kBegin, kEnd) at the points, beside what is there.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void add(TailSums (&to)[kRows], const ScoreTile<kHeadDim>& score) const {
    if constexpr (kKind == AlphaKind::kOneAndHalf) {
      HalfSums part[kRows];
#pragma unroll
      for (int i = kBegin / 2; i < kEnd / 2; i += 2) {
        const int r = i / 2 % 2;
        part[r].add(fmaf(score[i], to_z, -point[r]), fmaf(score[i + 1], to_z, -point[r]));
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        to[r].prob += part[r].prob();
        to[r].weight += part[r].weight();
      }
    } else {
      add_precisely<kBegin, kEnd>(to, score);
    }
  }

  template <int kBegin, int kEnd>
  __device__ __forceinline__ void add_precisely(TailSums (&to)[kRows], const ScoreTile<kHeadDim>& score) const {
    // NOTE: fmaf(), not a product and a sum: settle() and its caller would share the products, and spill.
    constexpr int kChains = 2;  // independent additions
    TailSums partial[kRows][kChains];
#pragma unroll
    for (int i = kBegin / 2; i < kEnd / 2; i += 4) {
      if constexpr (kKind == AlphaKind::kGeneral) {  // powers are dear: only where the warp has a gap
        bool has_gap = false;
#pragma unroll
        for (int e = 0; e < 4; ++e) has_gap |= fmaf(score[i + e], to_z, -point[e / 2]) > 0.0f;
        if (!__any_sync(kAllLanes, has_gap)) continue;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float gap = fmaxf(fmaf(score[i + e], to_z, -point[e / 2]), 0.0f);
        const float weight = entmax.weight(gap);
        TailSums& sum = partial[e / 2][e % kChains];
        sum.weight += weight;
        sum.prob += entmax.prob(gap, weight);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      to[r].prob += partial[r][0].prob + partial[r][1].prob;
      to[r].weight += partial[r][0].weight + partial[r][1].weight;
    }
  }

  // Adds a tile by its sums alone, without its maxima: one whose mask tiles all have keys above the points, none of
  // them by more than 1, and no NaN. Returns whether it is one, and what excess() is at the most; else adds nothing.
  // The whole warp.
  __device__ __forceinline__ bool add_full(const ScoreTile<kHeadDim>& score, int step, float& largest_excess) {
    static_assert(kKind == AlphaKind::kOneAndHalf, "half sums");
    HalfSums total[kRows];
    bool is_full = true;
#pragma unroll
    for (int half = 0; half < Config::kMaskTiles; ++half) {
      HalfSums part[kRows];
#pragma unroll
      for (int n = 0; n < kMaskKeys / 2; n += 2) {
        const int r = n / 2 % 2, i = half * (kMaskKeys / 2) + n;
        part[r].add(fmaf(score[i], to_z, -point[r]), fmaf(score[i + 1], to_z, -point[r]));
      }
      is_full &= __any_sync(kAllLanes, part[0].has_gap() || part[1].has_gap()) != 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (half == 0) {
          total[r] = part[r];
        } else {
          total[r].add(part[r]);
        }
      }
    }
    const float prob[kRows] = {total[0].prob(), total[1].prob()};
    if (!is_full || !__all_sync(kAllLanes, prob[0] <= 1.0f && prob[1] <= 1.0f)) return false;
    float most = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float weight = total[r].weight();
      sums[r].prob += prob[r];
      sums[r].weight += weight;
      // No gap is larger than the sum of all, which is of half precision: see row_line().
      const float point_excess =
          point[r] - s_snapshots[snapshot_of(step) * Config::kRowsPerWarp + row_in_warp(lane_id(), r)] * to_z;
      most = fmaxf(most, point_excess + weight * (1.0f + 0x1p-7f));
    }
    largest_excess = warp_max_of_positive(most);
    return true;
  }

  // The line of a row's sums over the quad, low enough for their rounding. Of half sums: height and slope are off by
  // less than 2^-8 of themselves each, and no step that counts is longer than the line is to its end: 2^-7 of the
  // height, and as much for what the moves before have added. Of others: `num_tiles` bounds it, 32 terms a tile and
  // chain.
  __device__ __forceinline__ NormLine row_line(const TailSums& lane_sums, int num_tiles) const {
    const TailSums total{quad_sum(lane_sums.prob), quad_sum(lane_sums.weight)};
    NormLine line = norm_line(entmax, total);
    constexpr float kSlack = kKind == AlphaKind::kOneAndHalf ? 0x1p-6f : kKind == AlphaKind::kTwo ? 0x1p-18f : 0x1p-15f;
    const float slack = num_tiles * 0x1p-19f + kSlack;
    line.height -= line.height * slack;
    return line;
  }

  // Rows whose window (max - 1, max] has jumped above their point, or that see their first keys, start again from this
  // tile, with a step of Newton's method from the window's border towards the tau of its keys. Its sums are not added
  // yet. The whole warp.
  // NOTE: H200, D = 64, 10% live, the scan with three steps: 7% more time at N = 4096, 16% at 1024, 2% at 16384. With
  // none, refinement takes 25% more, and twice its time where supports are dense.
  __device__ __forceinline__ void settle(const ScoreTile<kHeadDim>& score, const TileMaxima<kHeadDim>& tile_max,
                                         int num_tiles) {
    const TailSums likely_before[kRows] = {likely(0), likely(1)};
    const float point_before[kRows] = {point[0], point[1]};
    bool starts[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float lane_max = ptx::max_nan(tile_max[0][r], tile_max[1][r]);
      const float row_max = quad_max(lane_max < INFINITY ? lane_max : INFINITY);
      const float window = row_max * to_z - 1.0f;
      starts[r] = row_max < INFINITY && window > point[r];
      if (row_max == INFINITY) close(r);
      if (starts[r]) {
        move_certain(r, window);
        raise_threshold(r, point[r]);
      }
    }
    TailSums with_tile[kRows] = {sums[0], sums[1]};
    add<0, Config::kBlockN>(with_tile, score);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const NormLine line = row_line(with_tile[r], num_tiles);
      if (starts[r] && line.height > 1.0f) {
        move_certain(r, point[r] + line.step_to(1.0f));
        raise_threshold(r, point[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (starts[r]) move_unproven(r, likely_before[r], point_before[r]);
    }
  }

  // Adds the hits of the tile that is seen `step` tiles after the first. Calls mark(mask tile, excess) for each of its
  // mask tiles that has some. There is one excess for all: a tile that was marked with its neighbour's leaves the mask
  // later than it could. The whole warp.
  template <typename Mark>
  __device__ __forceinline__ void add_hits(const ScoreTile<kHeadDim>& score, int step, const Mark& mark) {
    // The rows' maxima over this lane's columns of each mask tile, as integers (see larger()).
    int most[Config::kMaskTiles][kRows];
    bool has_hit[Config::kMaskTiles];
#pragma unroll
    for (int half = 0; half < Config::kMaskTiles; ++half) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int first = half * kMaskKeys / 2 + 2 * r;
        most[half][r] = larger(__float_as_int(score[first]), __float_as_int(score[first + 1]));
#pragma unroll
        for (int n = 1; n < kMaskKeys / 8; ++n) {
          most[half][r] = larger(larger(most[half][r], __float_as_int(score[first + 4 * n])),
                                 __float_as_int(score[first + 4 * n + 1]));
        }
      }
      has_hit[half] = may_be_hit(0, most[half][0]) || may_be_hit(1, most[half][1]);
    }
    if (!__any_sync(kAllLanes, has_hit[0] || has_hit[1])) {
      num_full_tiles = 0;
      if (step == 0) take_snapshot(0);
      return;
    }

    TileMaxima<kHeadDim> tile_max;
    const auto find_hits = [&] {
#pragma unroll
      for (int half = 0; half < Config::kMaskTiles; ++half) {
        has_hit[half] = is_hit(0, tile_max[half][0]) || is_hit(1, tile_max[half][1]);
      }
    };
#pragma unroll
    for (int half = 0; half < Config::kMaskTiles; ++half) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) tile_max[half][r] = __int_as_float(most[half][r]);
    }
    if (__any_sync(kAllLanes, bits_bound[0] == INT_MIN || bits_bound[1] == INT_MIN)) {  // the integers do not tell
#pragma unroll
      for (int half = 0; half < Config::kMaskTiles; ++half) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int first = half * kMaskKeys / 2 + 2 * r;
          tile_max[half][r] = ptx::max_nan(score[first], score[first + 1]);
#pragma unroll
          for (int n = 1; n < kMaskKeys / 8; ++n) {
            tile_max[half][r] =
                ptx::max_nan(ptx::max_nan(tile_max[half][r], score[first + 4 * n]), score[first + 4 * n + 1]);
          }
        }
      }
      find_hits();
    }
    bool jumps = false;
#pragma unroll
    for (int half = 0; half < Config::kMaskTiles; ++half) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) jumps |= !(tile_max[half][r] * to_z - 1.0f <= point[r]);
    }
    if (__any_sync(kAllLanes, jumps)) {
      settle(score, tile_max, step + 1);
      find_hits();
    }
    if (step == 0) take_snapshot(0);
    const float row_maxima[] = {fmaxf(tile_max[0][0], tile_max[1][0]), fmaxf(tile_max[0][1], tile_max[1][1])};
    const uint16_t tile_excess = encode_excess(excess(snapshot_of(step), row_maxima));
    ++num_full_tiles;
#pragma unroll
    for (int half = 0; half < Config::kMaskTiles; ++half) {
      if (!__any_sync(kAllLanes, has_hit[half])) {
        num_full_tiles = 0;
        continue;
      }
      mark(half, tile_excess);
      if (half == 0) {
        add<0, kMaskKeys>(sums, score);
      } else {
        add<kMaskKeys, Config::kBlockN>(sums, score);
      }
    }
  }

  // Raises the thresholds by what the sums say; the points move to where tau should be once there are `growth` times as
  // many keys. The whole warp.
  __device__ __forceinline__ void solve(int num_tiles, float growth) {
    const float target = 1.0f / entmax.norm(growth);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const NormLine line = row_line(sums[r], num_tiles);
      if (!(line.height > 0.0f && line.slope > 0.0f)) continue;
      raise_threshold(r, point[r] + line.step_to(1.0f));
      move(r, fmaxf(point[r] + line.distance_to(target), threshold[r] * to_z));
    }
  }

  // Raises a threshold for the last time; returns how far above it tau should be. The whole warp.
  __device__ __forceinline__ float finish(int r, int num_tiles) {
    const NormLine line = row_line(sums[r], num_tiles);
    if (line.height > 0.0f && line.slope > 0.0f) raise_threshold(r, point[r] + line.step_to(1.0f));
    const float tau_lower = threshold[r] * to_z;
    const TailSums lane_sums = likely(r);
    const TailSums total{quad_sum(lane_sums.prob), quad_sum(lane_sums.weight)};
    const float expected_tau = point[r] + norm_line(entmax, total).distance_to(1.0f);
    // The line's mean gap at tau_lower, less than the row's largest one there: a refinement must start where there are
    // keys. NaN where all sums were lost.
    constexpr float kLargestLoss = 0.3f;
    const float mean_gap = divide(line.height, line.slope) - (tau_lower - point[r]);
    return fminf(expected_tau - tau_lower, fmaxf(kLargestLoss * mean_gap, 0.0f));
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
  // The most by which a score of the warp's rows exceeds its snapshot, given the maxima of the lane's rows.
  __device__ __forceinline__ float excess(int index, const float (&maxima)[kRows]) const {
    const float most = fmaxf(above_snapshot(index, 0, maxima[0]), above_snapshot(index, 1, maxima[1]));
    return warp_max_of_positive(fmaxf(most, 0.0f));
  }
  // The least by which a threshold of the warp's rows has risen since the snapshot; rows that had none do not count.
  __device__ __forceinline__ float rise(int index) const {
    const float least = fminf(above_snapshot(index, 0, threshold[0]), above_snapshot(index, 1, threshold[1]));
    return warp_min_of_positive(fmaxf(fminf(least, INFINITY), 0.0f));
  }
};

// What the producer and the consumers of a block share.
template <int kHeadDim>
struct ScanSmem {
  using Config = ScanConfig<kHeadDim>;
  uint8_t* bytes;
  uint32_t s_key, s_query;
  Ring<Config::kStages> ring;
  ItemSlots<1> slot;

  __device__ __forceinline__ explicit ScanSmem(uint8_t* bytes_)
      : bytes(bytes_),
        s_key(ptx::shared_address(bytes_)),
        s_query(s_key + Config::kQueryOffset),
        ring{s_key + Config::kBarrierOffset},
        slot(bytes_ + Config::kItemOffset) {}
};

// The producer warp.
template <int kHeadDim>
__device__ __forceinline__ void produce_keys(const ScanWithMaps& params, const ScanSmem<kHeadDim>& smem) {
  using Config = ScanConfig<kHeadDim>;
  using KeyTile = typename Config::KeyTile;
  using QueryTile = typename Config::QueryTile;
  ItemSlots<1>::Position item;
  RingPosition<Config::kStages> at;
  for_each_taken_item(params.queue, [&](BlockAt taken) {
    if (lane_id() != 0) return;
    const QueryBlock<Config::kBlockM> block(params.pass.problem, taken);
    const uint32_t query_full = smem.slot.fill(item, taken, Config::kConsumers * QueryTile::kBytes);
    item.advance();
    for (int i = 0; i < Config::kConsumers; ++i) {
      QueryTile::load(smem.s_query + i * QueryTile::kBytes, &params.query, query_full, block.row_begin + i * kWgmmaM,
                      block.head, block.batch);
    }
    for (int tile = Config::num_tiles(block) - 1; tile >= 0; --tile) {
      const uint32_t full = smem.ring.acquire(at.stage, at.parity, KeyTile::kBytes);
      KeyTile::load(smem.s_key + at.stage * KeyTile::kBytes, &params.key, full, tile * Config::kBlockN, block.kv_head,
                    block.batch);
      at.advance();
    }
  });
  if (lane_id() == 0) smem.slot.close(item);
}

// A consumer's part of an item.
template <typename Element, int kHeadDim, AlphaKind kKind>
__device__ __forceinline__ void scan_rows(const ScanWithMaps& params, const ScanSmem<kHeadDim>& smem,
                                          const QueryBlock<ScanConfig<kHeadDim>::kBlockM>& block,
                                          const ItemSlots<1>::Position& item,
                                          RingPosition<ScanConfig<kHeadDim>::kStages>& at) {
  using Config = ScanConfig<kHeadDim>;
  using KeyTile = typename Config::KeyTile;
  using QueryTile = typename Config::QueryTile;
  constexpr float kLargestGrowth = 4.0f;
  constexpr int kManyFullTiles = 6;
  const AttentionProblem& problem = params.pass.problem;
  const WorkRange& range = block.range;
  const int batch = block.batch, head = block.head, num_tiles = Config::num_tiles(block);
  const int consumer = warpgroup_id() - 1, warp = warp_id() - kWarpgroupWarps, lane = lane_id();
  const int group_row = block.row_begin + consumer * kWgmmaM;
  const int warp_row = block.row_begin + warp * Config::kRowsPerWarp;

  // Phase 1: the queries, into registers.
  uint32_t query[kHeadDim / kWgmmaK][4];
#pragma unroll
  for (int k = 0; k < kHeadDim / kWgmmaK; ++k) {
    ptx::ldmatrix_x4(query[k], smem.s_query + consumer * QueryTile::kBytes +
                                   QueryTile::offset(warp % kWarpgroupWarps * 16 + lane % 16, 2 * k + lane / 16));
  }
  smem.slot.release(item);

  const float alpha = head_alpha(problem, batch, head);
  RowBounds<kHeadDim, kKind> bounds;
  bounds.init(
      reinterpret_cast<float*>(smem.bytes + Config::kSnapshotOffset) + warp * Config::kSnapshots * Config::kRowsPerWarp,
      score_to_z(problem, alpha), alpha);
  int visible[Config::kRowsPerLane];  // keys that the row sees
#pragma unroll
  for (int r = 0; r < Config::kRowsPerLane; ++r) {
    visible[r] = range.num_visible_keys(warp_row + bounds.row_in_warp(lane, r));
    if (visible[r] == 0) bounds.close(r);
  }
  // Rows without keys take no hits whatever their scores, so only the first row that has some bounds the unmasked part.
  const int unmasked_end = range.num_visible_keys(larger(warp_row, range.first_row_of(0)));
  const int group_key_end = range.max_visible_keys(group_row, group_row + kWgmmaM);
  const int group_tiles = ceil_div(group_key_end, Config::kBlockN);

  // This warp's row of the mask and of the excesses; a word is written when its first tile is done.
  const BlockMaskShape& mask_shape = block.mask_shape;
  const int mask_row = warp_row / kMaskRows;
  const bool is_mask_row_there = mask_row < mask_shape.num_row_groups;
  const int64_t head_index = batch * problem.num_heads + head;
  uint32_t* g_mask =
      params.pass.block_mask + head_index * mask_shape.row_words() + int64_t(mask_row) * mask_shape.key_words();
  uint16_t* g_excess =
      params.pass.tile_excess + (head_index * mask_shape.num_row_groups + mask_row) * mask_shape.num_key_tiles;
  const int last_word = mask_word(num_tiles * Config::kMaskTiles - 1);
  uint32_t mask_bits = 0;
  const auto store_mask_word = [&](int word) {
    if (lane == 0 && is_mask_row_there && word < mask_shape.key_words()) g_mask[word] = mask_bits;
    mask_bits = 0;
  };
  for (int word = mask_shape.key_words() - 1; word > last_word; --word) store_mask_word(word);

  for (int tile = num_tiles - 1; tile >= 0; --tile) {
    const int key_begin = tile * Config::kBlockN;
    const int step = group_tiles - 1 - tile;  // tiles that this warpgroup has seen before

    // Phase 2: scores. Nothing is in flight over the loop's edge: the other warpgroups keep the tensor cores busy.
    ScoreTile<kHeadDim> score;
    smem.ring.wait(at.stage, at.parity);
    const uint32_t s_tile = smem.s_key + at.stage * KeyTile::kBytes;
    const int stage = at.stage;
    at.advance();
    if (step < 0) {  // is_causal: the upper warpgroups' rows end earlier
      if (lane == 0) smem.ring.release(stage);
      if (tile % (32 / Config::kMaskTiles) == 0) store_mask_word(mask_word(tile * Config::kMaskTiles));
      continue;
    }
    ptx::wgmma_pin(score);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kHeadDim / kWgmmaK; ++k) {
      ptx::wgmma_rs<Element, ptx::Major::kK>(score, query[k], KeyTile::k_major(s_tile, 0, k), k != 0);
    }
    ptx::wgmma_commit();
    // NOTE: all lanes agree on this, but by a vote ptxas knows it too. Without, the loop leaves the uniform registers.
    const bool may_be_full = __any_sync(kAllLanes, bounds.num_full_tiles >= kManyFullTiles);
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(score);
    if (lane == 0) smem.ring.release(stage);

    // Phase 3, tiles at an edge only: keys that a row does not see score -inf.
    if (key_begin + Config::kBlockN > unmasked_end) {
#pragma unroll
      for (int i = 0; i < Config::kBlockN / 2; ++i) {
        const int col = key_begin + i / 4 * 8 + accumulator_col(lane, i % 2);
        if (col >= visible[i / 2 % 2]) score[i] = -INFINITY;
      }
      ptx::wgmma_pin(
          score);  // NOTE: or ptxas copies scores into other registers in all tiles, to have them there in these
    }

    // Phase 4: hits join the sums, and their mask tiles are live. Where tile after tile is full of them, by its sums
    // alone.
    const auto mark = [&](int half, uint16_t excess) {
      const int mask_tile = tile * Config::kMaskTiles + half;
      mask_bits |= mask_bit(mask_tile);
      if (lane == 0 && is_mask_row_there) g_excess[mask_tile] = excess;
    };
    bool is_added = false;
    if constexpr (kKind == AlphaKind::kOneAndHalf) {
      if (__builtin_expect(may_be_full, 0)) {
        float excess;
        is_added = bounds.add_full(score, step, excess);
        if (is_added) {
#pragma unroll
          for (int half = 0; half < Config::kMaskTiles; ++half) mark(half, encode_excess(excess));
        } else {
          bounds.num_full_tiles = 0;
        }
      }
    }
    if (!is_added) bounds.add_hits(score, step, mark);
    if (tile % (32 / Config::kMaskTiles) == 0) store_mask_word(mask_word(tile * Config::kMaskTiles));

    // Phase 5, after 1, 2, 4, 8, ... tiles: better bounds.
    if (((step + 1) & step) == 0 && tile > 0) {
      const float growth = static_cast<float>(group_tiles) / static_cast<float>(step + 1);
      bounds.solve(step + 1, fminf(growth, kLargestGrowth));
      bounds.take_snapshot(snapshot_of(step + 1));
    }
  }

  // Phase 6: the result.
  const float start[] = {bounds.finish(0, group_tiles), bounds.finish(1, group_tiles)};
#pragma unroll
  for (int r = 0; r < Config::kRowsPerLane; ++r) {
    const int row = warp_row + bounds.row_in_warp(lane, r);
    if (lane % 4 != 0 || row >= range.num_queries) continue;
    const int64_t index = row_index(problem, batch, head, row);
    const float threshold = bounds.threshold[r];
    const bool has_keys = visible[r] > 0 && threshold != -INFINITY;
    params.pass.tau_lower[index] = !has_keys              ? INFINITY
                                   : threshold < INFINITY ? round_below(threshold * bounds.to_z)
                                                          : NAN;
    params.pass.is_coarse[index] = has_keys && threshold < INFINITY ? encode_start(start[r]) : uint8_t(0);
  }
  if (!is_mask_row_there) return;

  // Phase 7: tiles whose scores have all fallen below the final thresholds leave the mask. Lane l keeps the rises since
  // snapshot l, then looks at tile l of each word.
  const int num_snapshots = group_tiles > 0 ? snapshot_of(group_tiles - 1) + 1 : 0;
  float rise_since = 0.0f;
  for (int index = 0; index < num_snapshots; ++index) {
    const float rise = bounds.rise(index);
    if (lane == index) rise_since = rise;
  }
  __syncwarp();
  constexpr int kBatch = 4;  // words in flight
  const int num_words = last_word + 1 < mask_shape.key_words() ? last_word + 1 : mask_shape.key_words();
  for (int first_word = 0; first_word < num_words; first_word += kBatch) {
    uint32_t marked[kBatch];
    uint16_t excess[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) marked[i] = first_word + i < num_words ? g_mask[first_word + i] : 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      excess[i] = (marked[i] & mask_bit(lane)) != 0 ? g_excess[(first_word + i) * 32 + lane] : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first_word + i >= num_words) break;
      const bool is_marked = (marked[i] & mask_bit(lane)) != 0;
      const int steps_before = group_tiles - 1 - ((first_word + i) * 32 + lane) / Config::kMaskTiles;
      const float rise = __shfl_sync(kAllLanes, rise_since, is_marked ? snapshot_of(steps_before) : 0);
      const uint32_t live = __ballot_sync(kAllLanes, is_marked && decode_excess(excess[i]) >= rise);
      if (lane == 0) g_mask[first_word + i] = live;
    }
  }
}

template <typename Element, int kHeadDim, AlphaKind kKind>
__global__ void __launch_bounds__(ScanConfig<kHeadDim>::kThreads, 1)
    scan_kernel(const __grid_constant__ ScanWithMaps params) {
  using Config = ScanConfig<kHeadDim>;
  const ScanSmem<kHeadDim> smem(dynamic_smem());
  if (threadIdx.x == 0) {
    smem.ring.init(Config::kConsumers * kWarpgroupWarps);
    smem.slot.init(Config::kConsumers * kWarpgroupWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warpgroup_id() == 0) {
    ptx::setmaxnreg_decrease<Config::kProducerRegisters>();
    if (warp_id() == 0) produce_keys(params, smem);
  } else {
    ptx::setmaxnreg_increase<Config::kConsumerRegisters>();
    ItemSlots<1>::Position item;
    RingPosition<Config::kStages> at;
    for (BlockAt taken; (taken = smem.slot.wait(item)).x != smem.slot.kNone; item.advance()) {
      scan_rows<Element, kHeadDim, kKind>(params, smem, {params.pass.problem, taken}, item, at);
    }
  }
}

}  // namespace adasplash2::cuda::sm90
