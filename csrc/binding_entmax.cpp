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

#include "adasplash2.h"
#include "entmax_tensors.h"
#include "torch_threads.h"

namespace adasplash2 {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor entmax_forward_cpu(const Tensor& x, double alpha, const OptionalTensor& alpha_slices, int64_t dim) {
  return run_entmax_forward(x, alpha, alpha_slices, dim,
                            [](const EntmaxForward& params) { cpu::entmax_forward(params, torch_threads()); });
}

std::tuple<Tensor, Tensor> entmax_backward_cpu(const Tensor& grad_prob, const Tensor& prob, double alpha,
                                               const OptionalTensor& alpha_slices, int64_t dim,
                                               std::array<bool, 2> wanted) {
  return run_entmax_backward(grad_prob, prob, alpha, alpha_slices, dim, wanted,
                             [](const EntmaxBackward& params) { cpu::entmax_backward(params, torch_threads()); });
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
