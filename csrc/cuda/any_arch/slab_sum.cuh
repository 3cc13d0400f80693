// Adds up slabs, in order: (slabs, elements) float -> (elements,) float; no slabs are zeros. A thread an element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace adasplash2::cuda {

struct SlabSumParams {
  int num_slabs;
  int64_t num_elements;
  const float* slabs;
  float* sums;
};

constexpr int kSlabSumThreads = 256;

static __global__ void __launch_bounds__(kSlabSumThreads) slab_sum_kernel(const SlabSumParams params) {
  const int64_t element = int64_t(blockIdx.x) * kSlabSumThreads + threadIdx.x;
  if (element >= params.num_elements) return;
  float sum = 0.0f;
  for (int slab = 0; slab < params.num_slabs; ++slab) sum += params.slabs[slab * params.num_elements + element];
  params.sums[element] = sum;
}

}  // namespace adasplash2::cuda
