// entmax over one dimension of a tensor, for torch: operator schemas, autograd and the CPU entry points.
//
//   entmax_forward    prob of x, differentiable (Autograd) once
//   entmax_backward   the gradients of x and of alpha from the saved prob
//
// alpha is the number, or one value per slice: a tensor that broadcasts to x with size 1 at dim.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "adasplash2.h"
#include "check_tensor.h"
#include "torch_threads.h"

namespace adasplash2 {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tensor that fills its memory without gaps is (outer, length, inner) there whatever the order of its dimensions:
// inner is the stride of dim. So only tensors with gaps or overlaps are copied (as their empty_like: the layout of
// prob).
Tensor dense(const Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : at::empty_like(tensor).copy_(tensor);
}

Tensor laid_out_like(const Tensor& tensor, const Tensor& like) {
  return tensor.strides() == like.strides()
             ? tensor
             : at::empty_strided(like.sizes(), like.strides(), like.options()).copy_(tensor);
}

void fill_problem(EntmaxProblem& problem, const Tensor& dense_tensor, double alpha, int64_t dim) {
  problem.dtype = data_type(dense_tensor);
  const bool is_scalar = dense_tensor.dim() == 0;
  problem.length = is_scalar ? 1 : dense_tensor.size(dim);
  problem.inner = problem.length <= 1 ? 1 : dense_tensor.stride(dim);
  problem.outer = dense_tensor.numel() == 0 ? 0 : dense_tensor.numel() / (problem.length * problem.inner);
  problem.alpha = alpha;
}

// alpha by slice, as (outer, inner) of `dense_tensor` in memory.
Tensor alpha_by_slice(const Tensor& alpha_slices, const Tensor& dense_tensor, int64_t dim) {
  std::vector<int64_t> sizes = dense_tensor.sizes().vec(), strides = dense_tensor.strides().vec();
  TORCH_CHECK_VALUE(alpha_slices.device() == dense_tensor.device(), "adasplash2: alpha must be on ",
                    dense_tensor.device(), ", got ", alpha_slices.device());
  TORCH_CHECK_TYPE(at::isFloatingType(alpha_slices.scalar_type()), "adasplash2: alpha must be floating point, got ",
                   alpha_slices.scalar_type());
  if (!sizes.empty()) {
    const int64_t stride = strides[dim], length = sizes[dim];
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (strides[d] > stride && length > 0) strides[d] /= length;
    }
    sizes[dim] = 1;
  }
  TORCH_CHECK_VALUE(at::is_expandable_to(alpha_slices.sizes(), sizes), "adasplash2: alpha must broadcast to ",
                    at::IntArrayRef(sizes), " (x with size 1 at dim), got ", alpha_slices.sizes());
  const Tensor by_slice = at::empty_strided(sizes, strides, alpha_slices.options().dtype(at::kDouble));
  by_slice.copy_(alpha_slices);
  return by_slice;
}

void check_alpha(const Tensor& by_slice) {
  const double* alpha = by_slice.const_data_ptr<double>();
  for (int64_t slice = 0; slice < by_slice.numel(); ++slice) {
    TORCH_CHECK_VALUE(alpha[slice] > 1.0 && alpha[slice] <= 2.0,
                      "adasplash2: a tensor alpha must hold values in (1, 2], got ", alpha[slice]);
  }
}

Tensor entmax_forward_cpu(const Tensor& x, double alpha, const OptionalTensor& alpha_slices, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, x.dim());
  const Tensor dense_x = dense(x);
  const Tensor prob = at::empty_like(dense_x);
  EntmaxForward params;
  fill_problem(params, dense_x, alpha, dim);
  Tensor by_slice;
  if (alpha_slices) {
    by_slice = alpha_by_slice(*alpha_slices, dense_x, dim);
    check_alpha(by_slice);
    params.alpha_slices = by_slice.const_data_ptr<double>();
  } else {
    TORCH_CHECK_VALUE(alpha > 1.0 && alpha <= 2.0, "adasplash2: alpha must be in (1, 2], got ", alpha);
  }
  params.x = dense_x.const_data_ptr();
  params.prob = prob.data_ptr();
  cpu::entmax_forward(params, torch_threads());
  return prob;
}

std::tuple<Tensor, Tensor> entmax_backward_cpu(const Tensor& grad_prob, const Tensor& prob, double alpha,
                                               const OptionalTensor& alpha_slices, int64_t dim,
                                               std::array<bool, 2> wanted) {
  dim = at::maybe_wrap_dim(dim, prob.dim());
  check_tensor(grad_prob, "grad_prob", prob.sizes(), prob);
  check_dtype(grad_prob, "grad_prob", prob.scalar_type());
  const Tensor dense_prob = dense(prob);
  const Tensor dense_grad = laid_out_like(grad_prob, dense_prob);
  EntmaxBackward params;
  fill_problem(params, dense_prob, alpha, dim);
  const Tensor grad_x = wanted[0] ? at::empty_like(dense_prob) : at::empty({0}, prob.options());
  Tensor by_slice, grad_by_slice;
  if (alpha_slices) {
    by_slice = alpha_by_slice(*alpha_slices, dense_prob, dim);
    params.alpha_slices = by_slice.const_data_ptr<double>();
  }
  if (wanted[1]) {
    TORCH_CHECK_VALUE(alpha_slices, "adasplash2: only a tensor alpha has a gradient");
    grad_by_slice = at::zeros_like(by_slice);  // slices of length 0 are not visited
    params.grad_alpha = grad_by_slice.data_ptr<double>();
  }
  params.prob = dense_prob.const_data_ptr();
  params.grad_prob = dense_grad.const_data_ptr();
  params.grad_x = wanted[0] ? grad_x.data_ptr() : nullptr;
  cpu::entmax_backward(params, torch_threads());
  if (!wanted[1]) return {grad_x, at::empty({0}, prob.options())};
  return {grad_x, at::sum_to(grad_by_slice, alpha_slices->sizes()).to(alpha_slices->scalar_type())};
}

// ---- dispatcher entry points
// ------------------------------------------------------------------------------------------

Tensor entmax_forward(const Tensor& x, double alpha, const OptionalTensor& alpha_slices, int64_t dim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("adasplash2::entmax_forward", "")
                             .typed<decltype(entmax_forward)>();
  return op.call(x, alpha, alpha_slices, dim);
}

std::tuple<Tensor, Tensor> entmax_backward(const Tensor& grad_prob, const Tensor& prob, double alpha,
                                           const OptionalTensor& alpha_slices, int64_t dim,
                                           std::array<bool, 2> wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("adasplash2::entmax_backward", "")
                             .typed<decltype(entmax_backward)>();
  return op.call(grad_prob, prob, alpha, alpha_slices, dim, wanted);
}

// Saved: prob, which its consumers usually keep alive anyway. Not saved: x, tau.
struct EntmaxFunction : torch::autograd::Function<EntmaxFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, double alpha,
                        const OptionalTensor& alpha_slices, int64_t dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor prob = entmax_forward(x, alpha, alpha_slices, dim);
    ctx->save_for_backward({prob, alpha_slices.value_or(Tensor())});
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["dim"] = dim;
    return prob;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor alpha_slices = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    const std::array<bool, 2> wanted{ctx->needs_input_grad(0), alpha_slices && ctx->needs_input_grad(1)};
    const auto [grad_x, grad_alpha] = entmax_backward(grads[0], saved[0], ctx->saved_data["alpha"].toDouble(),
                                                      alpha_slices, ctx->saved_data["dim"].toInt(), wanted);
    return {wanted[0] ? grad_x : Tensor(), Tensor(), wanted[1] ? grad_alpha : Tensor(), Tensor()};
  }
};

Tensor entmax_autograd(const Tensor& x, double alpha, const OptionalTensor& alpha_slices, int64_t dim) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !x._fw_grad(/*level=*/0).defined() && !(alpha_slices && alpha_slices->_fw_grad(/*level=*/0).defined()),
      "adasplash2.entmax: forward-mode automatic differentiation is not built");
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || (alpha_slices && alpha_slices->requires_grad()))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return entmax_forward(x, alpha, alpha_slices, dim);
  }
  return EntmaxFunction::apply(x, alpha, alpha_slices, dim);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(adasplash2, m) {
  m.def("entmax_forward(Tensor x, float alpha, Tensor? alpha_slices, int dim) -> Tensor");
  m.def(
      "entmax_backward(Tensor grad_prob, Tensor prob, float alpha, Tensor? alpha_slices, int dim, bool[2] wanted) -> "
      "(Tensor grad_x, Tensor grad_alpha)");
}

TORCH_LIBRARY_IMPL(adasplash2, CPU, m) {
  m.impl("entmax_forward", entmax_forward_cpu);
  m.impl("entmax_backward", entmax_backward_cpu);
}

TORCH_LIBRARY_IMPL(adasplash2, Autograd, m) {
  m.impl("entmax_forward", entmax_autograd);
  m.impl("entmax_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace adasplash2
