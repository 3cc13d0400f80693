// The emulator's twin of csrc/cuda/device/tensor_map.cuh: the same shape, checked by the driver's published rules.
#pragma once

#include <simt_api.h>

#include <stdexcept>
#include <string>

#include "cuda/tensor_map_shape.h"

namespace adasplash2 {

// Opaque to kernels, as on the device.
struct alignas(64) TensorMap {
  TensorMapShape shape;
};

inline TensorMap make_tensor_map(const TensorMapShape& shape) {
  const auto require = [&](bool holds, const char* rule) {
    if (!holds) throw std::runtime_error(std::string("tensor map: ") + rule + ": " + describe(shape));
  };
  const uint32_t element_bytes = shape.element == TensorMapElement::kFloat32 ? 4 : 2;
  const uint32_t inner_bytes = shape.box[0] * element_bytes;
  require(shape.rank >= 2 && shape.rank <= 5, "rank must be 2 to 5");
  require(reinterpret_cast<uintptr_t>(shape.base) % 16 == 0, "the base must be 16-byte aligned");
  require(inner_bytes % 16 == 0, "the box's inner dimension must be a multiple of 16 bytes");
  require(
      shape.swizzle_bytes == 0 || shape.swizzle_bytes == 32 || shape.swizzle_bytes == 64 || shape.swizzle_bytes == 128,
      "swizzle must be 0, 32, 64 or 128 bytes");
  require(shape.swizzle_bytes == 0 || inner_bytes <= static_cast<uint32_t>(shape.swizzle_bytes),
          "the box's inner dimension is longer than the swizzle");
  for (int i = 0; i < shape.rank; ++i) {
    require(shape.size[i] >= 1 && shape.size[i] <= uint64_t{1} << 32, "sizes must be 1 to 2^32");
    require(shape.box[i] >= 1 && shape.box[i] <= 256, "boxes must be 1 to 256");
    require(i == 0 || (shape.stride_bytes[i] % 16 == 0 && shape.stride_bytes[i] < uint64_t{1} << 40),
            "strides must be multiples of 16 bytes below 2^40");
  }
  return TensorMap{shape};
}

}  // namespace adasplash2
