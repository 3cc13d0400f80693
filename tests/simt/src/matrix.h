// The tensor cores' arithmetic on plain arrays, and the formats of their inputs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace simt {

enum class MatrixElement { kBFloat16, kFloat16, kTf32 };

inline float element_value(MatrixElement element, uint16_t bits) {
  return element == MatrixElement::kBFloat16 ? bf16_bits_to_float(bits) : half_bits_to_float(bits);
}

// c[m][n] += a[m][k] b[k][n], the sums in ascending k and in float. The hardware's order is not documented.
template <int kN>
void multiply_add(const float* a, int a_pitch, const float (*b)[kN], float (*c)[kN], int m, int n, int k) {
  for (int row = 0; row < m; ++row) {
    for (int inner = 0; inner < k; ++inner) {
      const float factor = a[row * a_pitch + inner];
      for (int col = 0; col < n; ++col) c[row][col] += factor * b[inner][col];
    }
  }
}

}  // namespace simt
