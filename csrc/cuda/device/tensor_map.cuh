// Tensor maps for TMA, made on the host. The emulator's twin is tests/simt/include/tensor_map.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace adasplash2 {

using TensorMap = CUtensorMap;

enum class TensorMapElement { kBFloat16, kFloat16, kFloat32 };

// Dimension 0 is the innermost and contiguous; stride_bytes[i] is the step of dimension i and is not read for i = 0.
struct TensorMapShape {
  TensorMapElement element;
  const void* base;  // 16-byte aligned
  int rank;          // 2 to 5
  uint64_t size[5];
  uint64_t stride_bytes[5];  // multiples of 16
  uint32_t box[5];           // at most 256 elements each
  int swizzle_bytes;         // 0, 32, 64 or 128: the inner box is at most that long
};

// Every field, for the message when the driver refuses them without saying which.
inline std::string describe(const TensorMapShape& shape) {
  constexpr const char* kNames[] = {"bfloat16", "float16", "float32"};
  char base[32];
  std::snprintf(base, sizeof base, "%p", shape.base);
  const auto list = [&](const auto* values, int first) {
    std::string text;
    for (int i = first; i < shape.rank; ++i) text += (i == first ? "" : ", ") + std::to_string(values[i]);
    return text;
  };
  return std::string("element ") + kNames[static_cast<int>(shape.element)] + ", base " + base + ", rank " +
         std::to_string(shape.rank) + ", sizes {" + list(shape.size, 0) + "}, strides in bytes {" +
         list(shape.stride_bytes, 1) + "}, box {" + list(shape.box, 0) + "}, swizzle " +
         std::to_string(shape.swizzle_bytes);
}

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
