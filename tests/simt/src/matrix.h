// The tensor cores' arithmetic on plain arrays, and the formats of their inputs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

namespace simt {

enum class MatrixElement { kBFloat16, kFloat16, kTf32 };

inline float element_value(MatrixElement element, uint16_t bits) {
  return element == MatrixElement::kBFloat16 ? bf16_bits_to_float(bits) : half_bits_to_float(bits);
}

// c[m][n] += a[m][k] b[k][n] for the k of one instruction, rounded as on an H200 (README.md, "Rounding"): the products
// and c are cut towards zero 25 bits below the leading bit of the largest of them and added up, and the sum is cut to a
// float. Columns side by side, without branches: it is most of the emulator's arithmetic.
template <int kN>
void multiply_add(const float* a, int a_pitch, const float (*b)[kN], float (*c)[kN], int m, int n, int k) {
  constexpr uint32_t kBitsKept = 25, kBias = 127, kSmallestExponent = 27;  // 2^-100: the units stay normal numbers
  static_assert(17 * (int64_t{1} << (kBitsKept + 1)) < int64_t{1} << 31, "16 products and c must fit into int32_t");
  for (int row = 0; row < m; ++row) {
    const float* factors = a + row * a_pitch;
    float largest[kN], plain_sum[kN], to_units[kN], unit[kN];
    int32_t sum[kN];
    for (int col = 0; col < n; ++col) {
      largest[col] = std::fabs(c[row][col]);
      plain_sum[col] = c[row][col];
    }
    for (int inner = 0; inner < k; ++inner) {
      for (int col = 0; col < n; ++col) {
        const float product = factors[inner] * b[inner][col];  // exact: no factor has more than 11 bits
        largest[col] = std::fabs(product) > largest[col] ? std::fabs(product) : largest[col];
        plain_sum[col] += product;
      }
    }
    for (int col = 0; col < n; ++col) {
      const uint32_t exponent = std::max(__float_as_uint(largest[col]) >> 23, kSmallestExponent);
      to_units[col] = __uint_as_float((2 * kBias + kBitsKept - exponent) << 23);
      unit[col] = __uint_as_float((exponent - kBitsKept) << 23);
      sum[col] = static_cast<int32_t>(c[row][col] * to_units[col]);
    }
    for (int inner = 0; inner < k; ++inner) {
      for (int col = 0; col < n; ++col)
        sum[col] += static_cast<int32_t>(factors[inner] * b[inner][col] * to_units[col]);
    }
    for (int col = 0; col < n; ++col) {
      const auto nearest = static_cast<float>(sum[col]);
      const bool is_above = std::abs(static_cast<int32_t>(nearest)) > std::abs(sum[col]);
      const float cut = __uint_as_float(__float_as_uint(nearest) - is_above);
      c[row][col] = std::isfinite(plain_sum[col]) ? cut * unit[col] : plain_sum[col];
    }
  }
}

}  // namespace simt
