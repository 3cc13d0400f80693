// The tensor maps that were made last, by what they are made of: the calls of a training step, and the steps after it,
// ask for the same ones again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/tensor_map_shape.h"

namespace adasplash2 {

// A shape has one place; what was there before is made again when it is asked for. A map says nothing of the memory at
// its address but how to step through it, so it stays true whatever is allocated there.
template <typename Map>
class TensorMapCache {
 public:
  template <typename Make>
  const Map& find(const TensorMapShape& shape, Make make) {
    std::optional<Entry>& entry = entries_[hash(shape) % kEntries];
    if (!entry || !(entry->shape == shape)) entry.emplace(Entry{shape, make(shape)});
    return entry->map;
  }

 private:
  static constexpr size_t kEntries = 1024;  // a training step asks for 20 a layer

  struct Entry {
    TensorMapShape shape;
    Map map;
  };

  static uint64_t hash(const TensorMapShape& shape) {
    uint64_t mixed = reinterpret_cast<uintptr_t>(shape.base);
    for (int i = 0; i < shape.rank; ++i) {
      mixed = (mixed ^ shape.size[i]) * 0x9e3779b97f4a7c15u;
      mixed = (mixed ^ shape.stride_bytes[i]) * 0x9e3779b97f4a7c15u;
      mixed ^= shape.box[i];
    }
    return mixed * 0x9e3779b97f4a7c15u >> 32;
  }

  std::vector<std::optional<Entry>> entries_ = std::vector<std::optional<Entry>>(kEntries);
};

}  // namespace adasplash2
