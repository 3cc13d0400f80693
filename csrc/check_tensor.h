// Checks on tensors, and tensors -> params.h. Python has said what the user did wrong; this guards the kernels.
#pragma once

#include <ATen/ATen.h>

#include "params.h"

namespace adasplash2 {

inline DataType data_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DataType::kFloat32;
    case at::kBFloat16:
      return DataType::kBFloat16;
    case at::kHalf:
      return DataType::kFloat16;
    case at::kDouble:
      return DataType::kFloat64;
    case at::kBool:
      return DataType::kBool;
    default:
      TORCH_CHECK_TYPE(false, "adasplash2: expected a floating point or bool tensor, got ", tensor.scalar_type());
  }
}

inline void check_tensor(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, "adasplash2: ", name, " must have the shape ", sizes, ", got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "adasplash2: ", name, " must be on ", like.device(), ", got ",
                    tensor.device());
}

inline void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "adasplash2: ", name, " must have the dtype ", dtype, ", got ",
                   tensor.scalar_type());
}

inline void check_floating_point(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), "adasplash2: ", name, " must be floating point, got ",
                   tensor.scalar_type());
}

inline void check_alpha(double alpha) {
  TORCH_CHECK_VALUE(alpha > 1.0 && alpha <= 2.0, "adasplash2: alpha must be in (1, 2], got ", alpha);
}

// Of float64 on the CPU: on other devices the values would have to be waited for.
inline void check_alphas(const at::Tensor& alphas) {
  if (!alphas.device().is_cpu()) return;
  const at::Tensor values = alphas.contiguous();
  for (int64_t i = 0; i < values.numel(); ++i) {
    const double alpha = values.const_data_ptr<double>()[i];
    TORCH_CHECK_VALUE(alpha > 1.0 && alpha <= 2.0, "adasplash2: a tensor alpha must hold values in (1, 2], got ",
                      alpha);
  }
}

// The same values with a contiguous last dimension of a multiple of `multiple` elements, padded with zeros.
inline at::Tensor padded_rows(const at::Tensor& tensor, int64_t multiple) {
  const int64_t padding = (multiple - tensor.size(3) % multiple) % multiple;
  if (padding > 0) return at::constant_pad_nd(tensor, {0, padding});
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : tensor.contiguous();
}

// What a kernel wrote to padded rows, without the padding.
inline at::Tensor unpadded_rows(const at::Tensor& tensor, int64_t dim) {
  return tensor.size(3) == dim ? tensor : tensor.narrow(3, 0, dim).contiguous();
}

inline Rows rows(const at::Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline Mask mask_view(const at::Tensor& mask) {
  const auto stride = [&](int64_t dim) { return mask.size(dim) == 1 ? 0 : mask.stride(dim); };
  return {mask.data_ptr(), data_type(mask), stride(0), stride(1), stride(2), stride(3)};
}

}  // namespace adasplash2
