// The parts of <cuda_fp16.h> that kernels use: IEEE half precision, rounded to nearest even.
#pragma once

#include <cuda_runtime.h>

namespace simt {

// g++'s _Float16 has the same format and rounding; only the canonical NaN is the device's own.
inline uint16_t float_to_half_bits(float value) {
  if (std::isnan(value)) return 0x7fff;
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline float half_bits_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

}  // namespace simt

struct __half {
  __half() = default;
  __half(float value) : bits_(simt::float_to_half_bits(value)) {}
  operator float() const { return simt::half_bits_to_float(bits_); }

 private:
  uint16_t bits_;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __half2 __floats2half2_rn(float low, float high) { return {low, high}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
