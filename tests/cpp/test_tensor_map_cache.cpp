// tensor_map_cache.h: a map is made when its shape is new, in any one field, and found otherwise.
#include <functional>
#include <vector>

#include "check.h"
#include "cuda/tensor_map_cache.h"

namespace adasplash2::test {
namespace {

TensorMapShape example() {
  return {TensorMapElement::kBFloat16,
          reinterpret_cast<const void*>(0x7f0000001000),
          4,
          {64, 1000, 8, 2, 0},
          {2, 128, 128000, 1024000, 0},
          {64, 128, 1, 1, 0},
          128};
}

// Maps that say what they were made of.
struct CountingMaker {
  int num_made = 0;
  TensorMapShape operator()(const TensorMapShape& shape) {
    ++num_made;
    return shape;
  }
};

void finds_what_it_has() {
  TensorMapCache<TensorMapShape> cache;
  CountingMaker make;
  for (int i = 0; i < 3; ++i) {
    check(cache.find(example(), std::ref(make)) == example(), "call ", i, ": another shape's map");
  }
  check(make.num_made == 1, "made ", make.num_made, " times");
}

void tells_shapes_apart() {
  const std::vector<std::function<void(TensorMapShape&)>> changes = {
      [](auto& shape) { shape.element = TensorMapElement::kFloat16; },
      [](auto& shape) { shape.base = static_cast<const char*>(shape.base) + 16; },
      [](auto& shape) { shape.rank = 3; },
      [](auto& shape) { shape.size[0] = 48; },
      [](auto& shape) { shape.size[3] = 3; },
      [](auto& shape) { shape.stride_bytes[1] = 256; },
      [](auto& shape) { shape.stride_bytes[3] += 16; },
      [](auto& shape) { shape.box[1] = 64; },
      [](auto& shape) { shape.swizzle_bytes = 64; },
  };
  TensorMapCache<TensorMapShape> cache;
  CountingMaker make;
  cache.find(example(), std::ref(make));
  for (size_t i = 0; i < changes.size(); ++i) {
    TensorMapShape shape = example();
    changes[i](shape);
    check(!(shape == example()), "change ", i, ": the shapes are equal");
    check(cache.find(shape, std::ref(make)) == shape, "change ", i, ": another shape's map");
    check(make.num_made == static_cast<int>(i) + 2, "change ", i, ": made ", make.num_made, " times");
  }
}

// More shapes than places: whatever was pushed out comes back right.
void makes_again_what_it_lost() {
  TensorMapCache<TensorMapShape> cache;
  CountingMaker make;
  const auto shape_of = [](int i) {
    TensorMapShape shape = example();
    shape.base = static_cast<const char*>(shape.base) + 4096 * i;
    return shape;
  };
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 1000; ++i) {
      check(cache.find(shape_of(i), std::ref(make)) == shape_of(i), "shape ", i, ": another shape's map");
    }
  }
  check(make.num_made >= 1000 && make.num_made <= 2000, "made ", make.num_made, " times");
}

// The maps of many tensors of one shape, at addresses as an allocator gives them, mostly have places of their own.
void spreads_addresses() {
  TensorMapCache<TensorMapShape> cache;
  CountingMaker make;
  constexpr int kMaps = 64;
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < kMaps; ++i) {
      TensorMapShape shape = example();
      shape.base = static_cast<const char*>(shape.base) + (i << 21);
      cache.find(shape, std::ref(make));
    }
  }
  check(make.num_made < kMaps + kMaps / 2, "made ", make.num_made, " times for ", kMaps, " maps");
}

}  // namespace
}  // namespace adasplash2::test

int main() {
  adasplash2::test::finds_what_it_has();
  adasplash2::test::tells_shapes_apart();
  adasplash2::test::makes_again_what_it_lost();
  adasplash2::test::spreads_addresses();
  return adasplash2::test::result();
}
