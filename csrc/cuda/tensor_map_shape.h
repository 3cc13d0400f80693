// What a tensor map for TMA is made of, and how to say it. make_tensor_map() is in device/tensor_map.cuh, its twin in
// the emulator's.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace adasplash2 {

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

inline bool operator==(const TensorMapShape& a, const TensorMapShape& b) {
  bool is_equal = a.element == b.element && a.base == b.base && a.rank == b.rank && a.swizzle_bytes == b.swizzle_bytes;
  for (int i = 0; is_equal && i < a.rank; ++i) {
    is_equal = a.size[i] == b.size[i] && (i == 0 || a.stride_bytes[i] == b.stride_bytes[i]) && a.box[i] == b.box[i];
  }
  return is_equal;
}

// Every field, for the message when a shape is refused: the driver does not say which it did not like.
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

}  // namespace adasplash2
