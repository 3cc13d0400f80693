// attn_mask, as it enters scores: bool decides whether a key takes part, float is added to the score.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/tile/fragment.cuh"
#include "params.h"

namespace adasplash2::cuda {

// The mask of one (batch, head). Scores are as the tensor cores leave them: <q, k>, to be multiplied by `scale`.
template <typename Element>
class ScoreMask {
 public:
  __device__ __forceinline__ ScoreMask(const Mask& mask, int batch, int head, float scale)
      : mask_(mask),
        offset_(batch * mask.stride_batch + head * mask.stride_head),
        from_bias_(1.0f / scale),
        masked_(scale > 0.0f ? -INFINITY : INFINITY) {}

  __device__ __forceinline__ float apply(float score, int row, int key) const {
    const int64_t at = offset_ + row * mask_.stride_row + key * mask_.stride_col;
    if (mask_.dtype == DataType::kBool) return static_cast<const uint8_t*>(mask_.data)[at] != 0 ? score : masked_;
    const float bias = static_cast<float>(static_cast<const Element*>(mask_.data)[at]);
    return bias == -INFINITY ? masked_ : score + bias * from_bias_;  // -inf masks whatever the score is, NaN too
  }

  // 16 rows x 8 kN keys; nothing is read for keys at and past those that a row sees.
  template <int kN>
  __device__ __forceinline__ void apply_to(float (&score)[kN][4], int row_begin, int key_begin, int visible_first,
                                           int visible_second) const {
    const int lane = lane_id();
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      __syncwarp();  // NOTE: lets no load of this fragment move up to those before: many at once would spill registers
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = key_begin + n * kMmaN + accumulator_col(lane, e % 2);
        if (key < (e < 2 ? visible_first : visible_second)) {
          score[n][e] = apply(score[n][e], row_begin + accumulator_row(lane, e / 2), key);
        }
      }
    }
  }

 private:
  const Mask& mask_;
  int64_t offset_;
  float from_bias_;
  float masked_;  // -inf in units of z
};

}  // namespace adasplash2::cuda
