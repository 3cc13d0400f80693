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

// One rounding, to half: a float between that is odd where it is not exact leaves the tie to the last rounding. (The
// float sum of two halves is exact or has bits enough below a tie.)
inline float half_fma(float a, float b, float c) {
  const double exact = static_cast<double>(a) * b + c;
  float rounded = static_cast<float>(exact);
  if (std::isfinite(rounded) && rounded != exact) {
    if (std::fabs(rounded) > std::fabs(exact)) rounded = std::nextafter(rounded, 0.0f);
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits |= 1;
    std::memcpy(&rounded, &bits, sizeof rounded);
  }
  return rounded;
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
inline __half2 __hadd2(__half2 a, __half2 b) { return {float(a.x) + float(b.x), float(a.y) + float(b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {simt::half_fma(a.x, b.x, c.x), simt::half_fma(a.y, b.y, c.y)};
}
