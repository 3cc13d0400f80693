// The inputs of the entmax operators: tensors -> EntmaxForward and EntmaxBackward, the same for every device.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "adasplash2.h"
#include "check_tensor.h"
#include "page_allocator.h"

namespace adasplash2 {

// A tensor that fills its memory without gaps is (outer, length, inner) there whatever the order of its dimensions:
// inner is the stride of dim. So only tensors with gaps or overlaps are copied (as their empty_like: the layout of
// prob).
inline at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : at::empty_like(tensor).copy_(tensor);
}

inline at::Tensor laid_out_like(const at::Tensor& tensor, const at::Tensor& like) {
  return tensor.strides() == like.strides()
             ? tensor
             : at::empty_strided(like.sizes(), like.strides(), like.options()).copy_(tensor);
}

inline void fill_problem(EntmaxProblem& problem, const at::Tensor& dense_tensor, double alpha, int64_t dim) {
  problem.dtype = data_type(dense_tensor);
  const bool is_scalar = dense_tensor.dim() == 0;
  problem.length = is_scalar ? 1 : dense_tensor.size(dim);
  problem.inner = problem.length <= 1 ? 1 : dense_tensor.stride(dim);
  problem.outer = dense_tensor.numel() == 0 ? 0 : dense_tensor.numel() / (problem.length * problem.inner);
  problem.alpha = alpha;
}

// alpha by slice, as (outer, inner) of `dense_tensor` in memory.
inline at::Tensor alpha_by_slice(const at::Tensor& alpha_slices, const at::Tensor& dense_tensor, int64_t dim) {
  std::vector<int64_t> sizes = dense_tensor.sizes().vec(), strides = dense_tensor.strides().vec();
  TORCH_CHECK_VALUE(alpha_slices.device() == dense_tensor.device(), "adasplash2: alpha must be on ",
                    dense_tensor.device(), ", got ", alpha_slices.device());
  check_floating_point(alpha_slices, "alpha");
  if (!sizes.empty()) {
    const int64_t stride = strides[dim], length = sizes[dim];
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (strides[d] > stride && length > 0) strides[d] /= length;
    }
    sizes[dim] = 1;
  }
  TORCH_CHECK_VALUE(at::is_expandable_to(alpha_slices.sizes(), sizes), "adasplash2: alpha must broadcast to ",
                    at::IntArrayRef(sizes), " (x with size 1 at dim), got ", alpha_slices.sizes());
  const at::Tensor by_slice = at::empty_strided(sizes, strides, alpha_slices.options().dtype(at::kDouble));
  by_slice.copy_(alpha_slices);
  check_alphas(by_slice);
  return by_slice;
}

// run(params) is the kernel.
template <typename Run>
at::Tensor run_entmax_forward(const at::Tensor& x, double alpha, const std::optional<at::Tensor>& alpha_slices,
                              int64_t dim, const Run& run) {
  check_floating_point(x, "x");
  dim = at::maybe_wrap_dim(dim, x.dim());
  const at::Tensor dense_x = dense(x);
  const at::Tensor prob = empty_result_like(dense_x);
  EntmaxForward params;
  fill_problem(params, dense_x, alpha, dim);
  at::Tensor by_slice;
  if (alpha_slices) {
    by_slice = alpha_by_slice(*alpha_slices, dense_x, dim);
    params.alpha_slices = by_slice.const_data_ptr<double>();
  } else {
    check_alpha(alpha);
  }
  params.x = dense_x.const_data_ptr();
  params.prob = prob.data_ptr();
  run(params);
  return prob;
}

// The gradients of x and of alpha_slices, empty where they are not wanted.
template <typename Run>
std::tuple<at::Tensor, at::Tensor> run_entmax_backward(const at::Tensor& grad_prob, const at::Tensor& prob,
                                                       double alpha, const std::optional<at::Tensor>& alpha_slices,
                                                       int64_t dim, std::array<bool, 2> wanted, const Run& run) {
  dim = at::maybe_wrap_dim(dim, prob.dim());
  check_tensor(grad_prob, "grad_prob", prob.sizes(), prob);
  check_floating_point(prob, "prob");
  check_dtype(grad_prob, "grad_prob", prob.scalar_type());
  const at::Tensor dense_prob = dense(prob);
  const at::Tensor dense_grad = laid_out_like(grad_prob, dense_prob);
  EntmaxBackward params;
  fill_problem(params, dense_prob, alpha, dim);
  const at::Tensor grad_x = wanted[0] ? empty_result_like(dense_prob) : at::empty({0}, prob.options());
  at::Tensor by_slice, grad_by_slice;
  if (alpha_slices) {
    by_slice = alpha_by_slice(*alpha_slices, dense_prob, dim);
    params.alpha_slices = by_slice.const_data_ptr<double>();
  } else {
    check_alpha(alpha);
  }
  if (wanted[1]) {
    TORCH_CHECK_VALUE(alpha_slices, "adasplash2: only a tensor alpha has a gradient");
    grad_by_slice = at::zeros_like(by_slice);  // slices of length 0 are not visited
    params.grad_alpha = grad_by_slice.data_ptr<double>();
  }
  params.prob = dense_prob.const_data_ptr();
  params.grad_prob = dense_grad.const_data_ptr();
  params.grad_x = wanted[0] ? grad_x.data_ptr() : nullptr;
  run(params);
  if (!wanted[1]) return {grad_x, at::empty({0}, prob.options())};
  return {grad_x, at::sum_to(grad_by_slice, alpha_slices->sizes()).to(alpha_slices->scalar_type())};
}

}  // namespace adasplash2
