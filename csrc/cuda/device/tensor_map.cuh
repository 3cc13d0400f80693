// Tensor maps for TMA, made on the host. The emulator's twin is tests/simt/include/tensor_map.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/tensor_map_shape.h"

namespace adasplash2 {

using TensorMap = CUtensorMap;

// Through the runtime, so that nothing links against libcuda: a machine without a driver can load the library.
inline decltype(&cuTensorMapEncodeTiled) find_tensor_map_encoder() {
  void* entry_point = nullptr;
  cudaDriverEntryPointQueryResult query;
  const cudaError_t found =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry_point, 12000, cudaEnableDefault, &query);
  if (found != cudaSuccess || query != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry_point);
}

// Throws std::runtime_error when the driver refuses the shape.
inline TensorMap make_tensor_map(const TensorMapShape& shape) {
  static const auto encode = find_tensor_map_encoder();
  constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                            CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
  if (shape.swizzle_bytes == 32) swizzle = CU_TENSOR_MAP_SWIZZLE_32B;
  if (shape.swizzle_bytes == 64) swizzle = CU_TENSOR_MAP_SWIZZLE_64B;
  if (shape.swizzle_bytes == 128) swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  const cuuint32_t element_step[5] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult result = encode(&map, kTypes[static_cast<int>(shape.element)], static_cast<cuuint32_t>(shape.rank),
                                 const_cast<void*>(shape.base), shape.size, shape.stride_bytes + 1, shape.box,
                                 element_step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled refuses the tensor map, code " + std::to_string(result) + ": " +
                             describe(shape));
  }
  return map;
}

}  // namespace adasplash2
