// attn_mask, as it enters scores: bool decides whether a key takes part, float is added to the score.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/tile/fragment.cuh"
#include "params.h"

namespace adasplash2::cuda {

// What a mask has for accumulators of 16 x 8 kN scores, as it lies in memory: pairs[n][half] for a lane's two
// neighbours, two bytes of a bool mask or two elements.
template <typename Element, int kN>
struct MaskValues {
  static constexpr int kWords = 2 * sizeof(Element) / 4;
  struct Pair {
    uint32_t words[kWords];
  };
  Pair pairs[kN][2];
};

// The mask of one (batch, head). Scores are as the tensor cores leave them: <q, k>, to be multiplied by `scale`.
template <typename Element>
class ScoreMask {
 public:
  __device__ __forceinline__ ScoreMask(const Mask& mask, int batch, int head, float scale)
      : is_bool_(mask.dtype == DataType::kBool),
        stride_row_(mask.stride_row * size()),
        stride_col_(mask.stride_col * size()),
        g_mask_(static_cast<const uint8_t*>(mask.data) +
                (batch * mask.stride_batch + head * mask.stride_head) * size()),
        from_bias_(1.0f / scale),
        masked_(scale > 0.0f ? -INFINITY : INFINITY) {}

  // Scores of 16 kM rows x 8 kN keys, made by multiply() and masked. visible(i, half) is what a row sees: keys at and
  // past it are not read.
  template <int kM, int kN, typename Visible, typename Multiply>
  __device__ __forceinline__ void multiply_masked(float (&score)[kM][kN][4], int row_begin, int key_begin,
                                                  const Visible& visible, const Multiply& multiply) const {
    const int lane = lane_id(), key = key_begin + accumulator_col(lane, 0);
    apply_around<kM>(score, multiply, [&](MaskValues<Element, kN>& values, int i) {
      const uint8_t* g_first = at(row_begin + i * kMmaM + accumulator_row(lane, 0), key);
      const int64_t stride_half = kMmaM / 2 * stride_row_;
      const int visible_first = visible(i, 0), visible_second = visible(i, 1);
      const bool is_inside = key_begin + kN * kMmaN <= min(visible_first, visible_second);
      if (is_paired() && __all_sync(kAllLanes, is_inside)) {
        if (is_bool_) {
          load_pairs<uint16_t>(values, g_first, stride_half);
        } else {
          load_pairs<TwoElements>(values, g_first, stride_half);
        }
      } else {
        load_elements(values, g_first, stride_col_, stride_half, kMmaN * stride_col_, [&](int n, int half, int parity) {
          return key + n * kMmaN + parity < (half == 0 ? visible_first : visible_second);
        });
      }
    });
  }

  // The same for 16 rows, visible(half).
  template <int kN, typename Visible, typename Multiply>
  __device__ __forceinline__ void multiply_masked(float (&score)[kN][4], int row_begin, int key_begin,
                                                  const Visible& visible, const Multiply& multiply) const {
    multiply_masked(
        reinterpret_cast<float (&)[1][kN][4]>(score), row_begin, key_begin,
        [&](int, int half) { return visible(half); }, multiply);
  }

  // The transpose, 16 kM keys x 8 kN rows; is_there(i, n, half, parity) says what may be read.
  template <int kM, int kN, typename IsThere, typename Multiply>
  __device__ __forceinline__ void multiply_masked_transposed(float (&score)[kM][kN][4], int row_begin, int key_begin,
                                                             const IsThere& is_there, const Multiply& multiply) const {
    const int lane = lane_id(), row = row_begin + accumulator_col(lane, 0);
    apply_around<kM>(score, multiply, [&](MaskValues<Element, kN>& values, int i) {
      load_elements(values, at(row, key_begin + i * kMmaM + accumulator_row(lane, 0)), stride_row_,
                    kMmaM / 2 * stride_col_, kMmaN * stride_row_,
                    [&](int n, int half, int parity) { return is_there(i, n, half, parity); });
    });
  }

 private:
  using ElementBits = std::conditional_t<sizeof(Element) == 4, uint32_t, uint16_t>;
  using TwoElements = std::conditional_t<sizeof(Element) == 4, uint2, uint32_t>;

  // NOTE: loads go out before the product that the scores come from, so that neither waits for the other; those of
  // floats, which take twice the registers, after it.
  template <int kM, int kN, typename Multiply, typename Load>
  __device__ __forceinline__ void apply_around(float (&score)[kM][kN][4], const Multiply& multiply,
                                               const Load& load) const {
    constexpr bool kLoadsFirst = sizeof(Element) == 2;
    MaskValues<Element, kN> values[kM];
    const auto load_all = [&] {
#pragma unroll
      for (int i = 0; i < kM; ++i) load(values[i], i);
    };
    if constexpr (kLoadsFirst) load_all();
    multiply();
    if constexpr (!kLoadsFirst) load_all();
#pragma unroll
    for (int i = 0; i < kM; ++i) apply(score[i], values[i]);
  }

  // Scores whose elements are not there are masked, or stay as they are: nobody asks for them.
  template <int kN>
  __device__ __forceinline__ void apply(float (&score)[kN][4], const MaskValues<Element, kN>& values) const {
    const auto for_each_score = [&](const auto& body) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) body(score[n][e], values.pairs[n][e / 2].words, e % 2);
      }
    };
    if (is_bool_) {
      for_each_score([&](float& value, const uint32_t* words, int parity) {
        if ((words[0] >> 8 * parity & 0xffu) == 0) value = masked_;
      });
    } else {
      for_each_score([&](float& value, const uint32_t* words, int parity) {
        Element element;
        memcpy(static_cast<void*>(&element), reinterpret_cast<const Element*>(words) + parity, sizeof element);
        const float bias = static_cast<float>(element);
        // -inf masks whatever the score is, NaN too.
        value = bias == -INFINITY ? masked_ : value + bias * from_bias_;
      });
    }
  }

  __device__ __forceinline__ int size() const { return is_bool_ ? 1 : int(sizeof(Element)); }
  __device__ __forceinline__ const uint8_t* at(int row, int key) const {
    return g_mask_ + row * stride_row_ + key * stride_col_;
  }

  // Whether a lane's two neighbours are one aligned access, in every row.
  __device__ __forceinline__ bool is_paired() const {
    return stride_col_ == size() && (reinterpret_cast<uintptr_t>(g_mask_) | stride_row_) % (2 * size()) == 0;
  }

  template <typename Two, int kN>
  static __device__ __forceinline__ void load_pairs(MaskValues<Element, kN>& values, const uint8_t* g_first,
                                                    int64_t stride_half) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Two* g_pairs = reinterpret_cast<const Two*>(g_first + half * stride_half);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const Two two = g_pairs[n * (kMmaN / 2)];
        memcpy(&values.pairs[n][half], &two, sizeof two);
      }
    }
  }

  // One by one, with strides in bytes from parity, half and n to the next. What is not there is zero.
  template <int kN, typename IsThere>
  __device__ __forceinline__ void load_elements(MaskValues<Element, kN>& values, const uint8_t* g_first,
                                                int64_t stride_parity, int64_t stride_half, int64_t stride_n,
                                                const IsThere& is_there) const {
    const auto load_as = [&](auto zero) {
      using Bits = decltype(zero);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Bits bits[2];
#pragma unroll
          for (int parity = 0; parity < 2; ++parity) {
            const uint8_t* g_element = g_first + n * stride_n + half * stride_half + parity * stride_parity;
            bits[parity] = is_there(n, half, parity) ? *reinterpret_cast<const Bits*>(g_element) : zero;
          }
          memcpy(&values.pairs[n][half], bits, sizeof bits);
        }
      }
    };
    if (is_bool_) {
      load_as(uint8_t{0});
    } else {
      load_as(ElementBits{0});
    }
  }

  bool is_bool_;
  int64_t stride_row_, stride_col_;  // in bytes
  const uint8_t* g_mask_;
  float from_bias_;
  float masked_;  // -inf in units of z
};

}  // namespace adasplash2::cuda
