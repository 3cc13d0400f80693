// Attention as torch sees it: operator schemas, autograd, autocast, and the CPU entry points (CUDA: binding_cuda.cpp).
//
//   attention            what Python calls; differentiable (Autograd), cast like SDPA (Autocast)
//   attention_forward    the forward kernels, with everything the backward pass wants saved
//   attention_backward   the backward kernels
#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>

#include "adasplash2.h"
#include "check_tensor.h"
#include "cpu/page_cache.h"
#include "cpu/support_layout.h"
#include "cuda/support_layout.h"
#include "error.h"
#include "math/block_mask.h"
#include "page_allocator.h"
#include "problem_tensors.h"
#include "torch_threads.h"

namespace adasplash2 {
namespace {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The support (support_layout.h) of a forward pass. It is sized for the worst case that is still saved, so that its
// shape does not depend on the data; but pages are committed as they are written, from the front, so it costs only the
// memory of what there is. Behind that there are zeros, the same contents for the same input, unless nobody looks: then
// what other supports left stays there, so that a larger one later finds its pages.
class SupportTensor {
 public:
  // While one lives, what calls of this thread save is for the backward kernels alone.
  struct Unseen {
    Unseen() { is_unseen_ = true; }
    ~Unseen() { is_unseen_ = false; }
  };

  explicit SupportTensor(const AttentionProblem& problem) : layout_(problem) {
    constexpr int64_t kWorthMapping = 1 << 16;
    const int64_t bytes = layout_.bytes();
    const auto options = at::TensorOptions().dtype(at::kByte);
    if (bytes < kWorthMapping) {
      tensor_ = at::zeros({bytes}, options);
      return;
    }
    const cpu::Pages pages = cpu::take_pages(bytes);
    num_stale_ = static_cast<int64_t>(pages.used);
    std::memset(pages.data, 0, std::min(num_stale_, layout_.entries_offset()));
    const int64_t num_left = is_unseen_ ? num_stale_ : 0;
    const auto give_back = [layout = layout_, num_left](void* data) {
      cpu::give_pages(data, layout.bytes(), std::max(num_left, layout.used_bytes(data)));
    };
    tensor_ = at::from_blob(pages.data, {bytes}, give_back, options);
  }

  void* data() const { return tensor_.data_ptr(); }

  // When the kernels are done.
  Tensor finish() const {
    const int64_t used = layout_.used_bytes(data());
    if (num_stale_ > used && !is_unseen_) std::memset(static_cast<char*>(data()) + used, 0, num_stale_ - used);
    return tensor_;
  }

 private:
  static thread_local bool is_unseen_;
  cpu::SupportLayout layout_;
  int64_t num_stale_ = 0;  // bytes from the front that other supports may have left
  Tensor tensor_;
};

thread_local bool SupportTensor::is_unseen_ = false;

at::ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_forward_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& key_lengths, const OptionalTensor& alpha_heads, double alpha, double scale, bool is_causal,
    bool want_aux, bool want_support) {
  AttentionForward params;
  ProblemTensors tensors;
  fill_problem(params, tensors, query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal,
               cpu::kHeadDimMultiple);
  const std::array<int64_t, 3> rows_shape{params.batch, params.num_heads, params.num_queries};
  const Tensor out =
      empty_result({params.batch, params.num_heads, params.num_queries, params.value_head_dim}, query.options());
  const Tensor tau = at::empty(rows_shape, query.options().dtype(accumulation_type(query)));
  const Tensor support_size = at::empty(rows_shape, query.options().dtype(at::kInt));
  const auto num_tiles = [](int64_t n) { return (n + 63) / 64; };
  const Tensor block_mask =
      want_aux ? at::zeros({params.batch, params.num_heads, num_tiles(params.num_queries), num_tiles(params.num_keys)},
                           query.options().dtype(at::kByte))
               : at::empty({0}, query.options().dtype(at::kByte));
  std::optional<SupportTensor> support;
  if (want_support) support.emplace(params);
  params.out = rows(out);
  params.tau = tau.data_ptr();
  params.support_size = support_size.data_ptr<int32_t>();
  params.block_mask = want_aux ? block_mask.data_ptr<uint8_t>() : nullptr;
  params.support = want_support ? support->data() : nullptr;
  cpu::attention_forward(params, torch_threads());
  return {unpadded_rows(out, value.size(3)), tau, support_size, block_mask,
          want_support ? support->finish() : at::empty({0}, at::kByte)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths, const OptionalTensor& alpha_heads,
    const Tensor& /*tau*/, const Tensor& support_size, const Tensor& support, double alpha, double scale,
    bool is_causal, std::array<bool, 5> wanted) {
  AttentionBackward params;
  ProblemTensors tensors;
  fill_problem(params, tensors, query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal,
               cpu::kHeadDimMultiple);
  check_tensor(grad_out, "grad_out", {params.batch, params.num_heads, params.num_queries, value.size(3)}, query);
  const std::array<int64_t, 3> rows_shape{params.batch, params.num_heads, params.num_queries};
  check_tensor(support_size, "support_size", rows_shape, query);
  check_dtype(support_size, "support_size", at::kInt);
  check_tensor(support, "support", {cpu::support_bytes(params)}, query);
  check_dtype(support, "support", at::kByte);
  TORCH_CHECK(support_size.is_contiguous() && support.is_contiguous(),
              "adasplash2: the saved support must be contiguous");
  const Tensor padded_grad_out = padded_rows(grad_out.to(query.scalar_type()), cpu::kHeadDimMultiple);
  const auto gradient = [&](bool is_wanted, const Tensor& like, int64_t dim) {
    return is_wanted ? empty_result({like.size(0), like.size(1), like.size(2), dim}, query.options())
                     : at::empty({0}, query.options());
  };
  const Tensor grad_query = gradient(wanted[0], query, params.head_dim);
  const Tensor grad_key = gradient(wanted[1], key, params.head_dim);
  const Tensor grad_value = gradient(wanted[2], value, params.value_head_dim);
  Tensor grad_mask = at::empty({0}, query.options());
  const auto accumulation = query.options().dtype(accumulation_type(query));
  if (wanted[3]) {
    // The kernels address it with the mask's own strides, so it is a mask of distinct, dense elements.
    TORCH_CHECK(attn_mask && tensors.mask.scalar_type() != at::kBool,
                "adasplash2: only a float attn_mask has a gradient");
    tensors.mask = tensors.mask.contiguous();
    params.mask = mask_view(tensors.mask);
    grad_mask = at::zeros(tensors.mask.sizes(), accumulation);
    params.grad_mask = grad_mask.data_ptr();
  }
  Tensor grad_alpha = at::empty({0}, query.options().dtype(at::kDouble));
  if (wanted[4]) {
    TORCH_CHECK(alpha_heads, "adasplash2: only a tensor alpha has a gradient");
    grad_alpha = at::empty({params.batch, params.num_heads}, query.options().dtype(at::kDouble));
    params.grad_alpha = grad_alpha.data_ptr<double>();
  }
  params.support_size = support_size.const_data_ptr<int32_t>();
  params.support = support.const_data_ptr();
  params.grad_out = rows(padded_grad_out);
  if (wanted[0]) params.grad_query = rows(grad_query);
  if (wanted[1]) params.grad_key = rows(grad_key);
  if (wanted[2]) params.grad_value = rows(grad_value);
  cpu::attention_backward(params, torch_threads());
  const auto unpadded = [](const Tensor& gradient, const Tensor& like, bool is_wanted) {
    return is_wanted ? unpadded_rows(gradient, like.size(3)) : gradient;
  };
  return {unpadded(grad_query, query, wanted[0]), unpadded(grad_key, key, wanted[1]),
          unpadded(grad_value, value, wanted[2]), wanted[3] ? grad_mask.to(query.scalar_type()) : grad_mask,
          grad_alpha};
}

// ---- dispatcher entry points
// ------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& key_lengths, const OptionalTensor& alpha_heads, double alpha, double scale, bool is_causal,
    bool want_aux, bool want_support) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("adasplash2::attention_forward", "")
                             .typed<decltype(attention_forward)>();
  return op.call(query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal, want_aux,
                 want_support);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths, const OptionalTensor& alpha_heads,
    const Tensor& tau, const Tensor& support_size, const Tensor& support, double alpha, double scale, bool is_causal,
    std::array<bool, 5> wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("adasplash2::attention_backward", "")
                             .typed<decltype(attention_backward)>();
  return op.call(grad_out, query, key, value, attn_mask, key_lengths, alpha_heads, tau, support_size, support, alpha,
                 scale, is_causal, wanted);
}

using AttentionResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

AttentionResult attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                          const OptionalTensor& key_lengths, const OptionalTensor& alpha_heads, double alpha,
                          double scale, bool is_causal, bool want_aux) {
  auto [out, tau, support_size, block_mask, support] =
      attention_forward(query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal, want_aux,
                        /*want_support=*/false);
  return {out, tau, support_size, block_mask};
}

// Saved: the inputs, tau and the support size of every row, and what the kernels of the device keep of the support
// (cpu/support_layout.h, cuda/support_layout.h). Not saved: out, any score, any probability.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& query,
                                                const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                                                const OptionalTensor& key_lengths, const OptionalTensor& alpha_heads,
                                                double alpha, double scale, bool is_causal, bool want_aux) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const SupportTensor::Unseen unseen;
    auto [out, tau, support_size, block_mask, support] =
        attention_forward(query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal, want_aux,
                          /*want_support=*/true);
    ctx->save_for_backward({query, key, value, attn_mask.value_or(Tensor()), key_lengths.value_or(Tensor()),
                            alpha_heads.value_or(Tensor()), tau, support_size, support});
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["is_causal"] = is_causal;
    ctx->mark_non_differentiable({tau, support_size, block_mask});
    return {out, tau, support_size, block_mask};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto optional = [&](int index) {
      return saved[index].defined() ? OptionalTensor(saved[index]) : std::nullopt;
    };
    // The inputs of needs_input_grad are numbered without the optional ones that are absent.
    const size_t alpha_input = 3 + saved[3].defined() + saved[4].defined();
    const std::array<bool, 5> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                     saved[3].defined() && ctx->needs_input_grad(3),
                                     saved[5].defined() && ctx->needs_input_grad(alpha_input)};
    const auto [grad_query, grad_key, grad_value, grad_mask, grad_alpha] =
        attention_backward(grads[0], saved[0], saved[1], saved[2], optional(3), optional(4), optional(5), saved[6],
                           saved[7], saved[8], ctx->saved_data["alpha"].toDouble(), ctx->saved_data["scale"].toDouble(),
                           ctx->saved_data["is_causal"].toBool(), wanted);
    const auto if_wanted = [&](int index, const Tensor& gradient) { return wanted[index] ? gradient : Tensor(); };
    return {if_wanted(0, grad_query),
            if_wanted(1, grad_key),
            if_wanted(2, grad_value),
            if_wanted(3, grad_mask),
            Tensor(),
            if_wanted(4, grad_alpha),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

AttentionResult attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
                                   const OptionalTensor& alpha_heads, double alpha, double scale, bool is_causal,
                                   bool want_aux) {
  for (const OptionalTensor& tensor :
       {OptionalTensor(query), OptionalTensor(key), OptionalTensor(value), attn_mask, alpha_heads}) {
    TORCH_CHECK_NOT_IMPLEMENTED(!(tensor && tensor->_fw_grad(/*level=*/0).defined()),
                                "adasplash2.entmax_attention: forward-mode automatic differentiation is not built");
  }
  const auto needs_grad = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  if (!at::GradMode::is_enabled() || !(query.requires_grad() || key.requires_grad() || value.requires_grad() ||
                                       needs_grad(attn_mask) || needs_grad(alpha_heads))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return attention(query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal, want_aux);
  }
  const auto results = AttentionFunction::apply(query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale,
                                                is_causal, want_aux);
  return {results[0], results[1], results[2], results[3]};
}

template <c10::DeviceType device, c10::DispatchKey autocast_key>
AttentionResult attention_autocast(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
                                   const OptionalTensor& alpha_heads, double alpha, double scale, bool is_causal,
                                   bool want_aux) {
  c10::impl::ExcludeDispatchKeyGuard guard(autocast_key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, device); };
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("adasplash2::attention", "").typed<decltype(attention)>();
  return op.call(cast(query), cast(key), cast(value), attn_mask ? OptionalTensor(cast(*attn_mask)) : attn_mask,
                 key_lengths, alpha_heads, alpha, scale, is_causal, want_aux);
}

// setup.py says why a build has no CUDA kernels; binding_cuda.cpp holds their entry points otherwise.
#ifdef ADASPLASH2_CUDA_MISSING
constexpr bool kHasCuda = false;
constexpr const char* kCudaMissing = ADASPLASH2_CUDA_MISSING;
constexpr const char* kCudaBuild = "";
std::vector<std::string> cuda_paths() { return {}; }

void say_cuda_is_missing(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "adasplash2: CUDA tensors need the CUDA kernels; ", kCudaMissing);
}
#else
constexpr bool kHasCuda = true;
constexpr const char* kCudaMissing = "";
constexpr const char* kCudaBuild = ADASPLASH2_CUDA_BUILD;
std::vector<std::string> cuda_paths() { return cuda::built_paths(); }
#endif

#ifdef __clang__
constexpr const char* kCompiler = __VERSION__;  // with its name
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

}  // namespace

TORCH_LIBRARY(adasplash2, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_lengths, Tensor? alpha_heads, "
      "float alpha, float scale, bool is_causal, bool want_aux) -> (Tensor out, Tensor tau, Tensor "
      "support_size, "
      "Tensor block_mask)");
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_lengths, "
      "Tensor? alpha_heads, float alpha, float scale, bool is_causal, bool want_aux, bool want_support) -> "
      "(Tensor out, Tensor tau, Tensor support_size, Tensor block_mask, Tensor support)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "Tensor? key_lengths, Tensor? alpha_heads, Tensor tau, Tensor support_size, Tensor support, float alpha, "
      "float scale, bool is_causal, bool[5] wanted) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_mask, Tensor grad_alpha)");
}

TORCH_LIBRARY_IMPL(adasplash2, CPU, m) {
  m.impl("attention", attention);
  m.impl("attention_forward", attention_forward_cpu);
  m.impl("attention_backward", attention_backward_cpu);
}

TORCH_LIBRARY_IMPL(adasplash2, CUDA, m) {
  m.impl("attention", attention);
#ifdef ADASPLASH2_CUDA_MISSING
  for (const char* name : {"attention_forward", "attention_backward", "entmax_forward", "entmax_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&say_cuda_is_missing>());
  }
#endif
}

TORCH_LIBRARY_IMPL(adasplash2, Autograd, m) {
  m.impl("attention", attention_autograd);
  m.impl("attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("attention_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(adasplash2, AutocastCPU, m) {
  m.impl("attention", attention_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(adasplash2, AutocastCUDA, m) {
  m.impl("attention", attention_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of adasplash2; importing it registers torch.ops.adasplash2.";
  m.attr("version") = ADASPLASH2_VERSION;
  m.attr("compiler") = kCompiler;
  m.attr("has_cuda") = kHasCuda;
  m.attr("cuda_build") = kCudaBuild;
  m.attr("cuda_missing") = kCudaMissing;
  m.attr("cuda_paths") = cuda_paths();
  m.attr("support_layout") =
      py::make_tuple(cpu::kRowBlock, cpu::kStripKeys, cpu::kSavedPerRow, cpu::SupportLayout::kAlignment);
  m.attr("cuda_support_layout") = py::make_tuple(kMaskRows, kMaskKeys, cuda::kHeadDimMultiple);
  m.def("isa_levels", &cpu::isa_levels, "Instruction sets this machine can run, slowest first.");
  m.def("isa", &cpu::isa, "The instruction set in use.");
  m.def("set_isa", &cpu::set_isa, "Choose the instruction set (tests and measurements).");
  const std::string capability = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
  if (capability == "DEFAULT") cpu::set_isa("baseline");
  else if (capability == "AVX2") cpu::set_isa("avx2");
}

}  // namespace adasplash2
