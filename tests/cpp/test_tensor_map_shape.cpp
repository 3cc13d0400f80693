// tensor_map_shape.h: the message of a refused tensor map names every field, with its value.
#include <string>

#include "check.h"
#include "cuda/tensor_map_shape.h"

namespace adasplash2::test {
namespace {

void every_field_is_named() {
  TensorMapShape shape{};
  shape.element = TensorMapElement::kFloat16;
  shape.base = reinterpret_cast<const void*>(0x7f00abc0);
  shape.rank = 4;
  const uint64_t sizes[] = {40, 1300, 8, 3}, strides[] = {2, 80, 104000, uint64_t(1) << 39};
  const uint32_t box[] = {64, 128, 1, 1};
  for (int i = 0; i < shape.rank; ++i) {
    shape.size[i] = sizes[i];
    shape.stride_bytes[i] = strides[i];
    shape.box[i] = box[i];
  }
  shape.swizzle_bytes = 128;
  const std::string text = describe(shape);
  for (const char* field : {"element float16", "base 0x7f00abc0", "rank 4", "sizes {40, 1300, 8, 3}",
                            "strides in bytes {80, 104000, 549755813888}", "box {64, 128, 1, 1}", "swizzle 128"}) {
    check(text.find(field) != std::string::npos, "no '", field, "' in '", text, "'");
  }
}

void elements_have_names() {
  TensorMapShape shape{};
  const char* const names[] = {"bfloat16", "float16", "float32"};
  for (const auto element : {TensorMapElement::kBFloat16, TensorMapElement::kFloat16, TensorMapElement::kFloat32}) {
    shape.element = element;
    const std::string expected = std::string("element ") + names[static_cast<int>(element)] + ",";
    check(describe(shape).rfind(expected, 0) == 0, describe(shape));
  }
}

}  // namespace
}  // namespace adasplash2::test

int main() {
  using namespace adasplash2::test;
  every_field_is_named();
  elements_have_names();
  return result();
}
