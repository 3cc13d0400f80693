// Sums of gaps and of their squares in half precision, two gaps an instruction, alpha = 1.5. For those who count on
// neither more than 2^-8 of a sum: a gap is at most 1 and rounds by 2^-11 of itself, and so does each of the few
// additions before a sum goes on as float. Roundings go either way, so many sums err far less than one may.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "cuda/ptx/convert.cuh"

namespace adasplash2::cuda {

class HalfSums {
 public:
  __device__ __forceinline__ HalfSums() : prob_(__floats2half2_rn(0.0f, 0.0f)), weight_(prob_) {}

  // The gaps are the distances that are positive.
  __device__ __forceinline__ void add(float first_distance, float second_distance) {
    const uint32_t bits = ptx::pack_f16_relu(first_distance, second_distance);
    __half2 gaps;
    memcpy(&gaps, &bits, sizeof gaps);
    prob_ = __hfma2(gaps, gaps, prob_);
    weight_ = __hadd2(weight_, gaps);
  }

  __device__ __forceinline__ void add(const HalfSums& other) {
    prob_ = __hadd2(prob_, other.prob_);
    weight_ = __hadd2(weight_, other.weight_);
  }

  // A gap of 2^-25 and more, or a NaN.
  __device__ __forceinline__ bool has_gap() const {
    uint32_t bits;
    memcpy(&bits, &weight_, sizeof bits);
    return bits != 0;
  }

  __device__ __forceinline__ float prob() const { return sum(prob_); }
  __device__ __forceinline__ float weight() const { return sum(weight_); }

 private:
  static __device__ __forceinline__ float sum(__half2 pair) {
    const float2 halves = __half22float2(pair);
    return halves.x + halves.y;
  }

  __half2 prob_, weight_;
};

}  // namespace adasplash2::cuda
