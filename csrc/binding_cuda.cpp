// The operators of binding.cpp on CUDA tensors: memory and streams for the kernels of cuda/launch.h.
//
// NOTE: torch's device-independent interface gives the device guard and the stream. Without a header of c10/cuda this
// file compiles, links and can be imported with a CPU build of torch as well.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <tuple>

#include "check_tensor.h"
#include "cuda/launch.h"
#include "cuda/support_layout.h"
#include "entmax_tensors.h"
#include "error.h"
#include "math/block_mask.h"
#include "problem_tensors.h"

namespace adasplash2 {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kPublicTile = 64;  // rows and keys of a tile of the block mask that Python sees
static_assert(kMaskKeys == kPublicTile && kPublicTile % kMaskRows == 0, "public tiles are made of whole kernel tiles");

void* current_stream(const Tensor& tensor) {
  return c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device()).native_handle();
}

// What the kernel layer throws, as the exceptions that Python shall see.
template <typename Body>
void translate_errors(const Body& body) {
  try {
    body();
  } catch (const NotBuilt& error) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, error.what());
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// ADASPLASH2_CUDA_PATH = auto, sm80 or sm90: for tests and measurements.
cuda::Path requested_path() {
  const char* name = std::getenv("ADASPLASH2_CUDA_PATH");
  return name == nullptr ? cuda::Path::kAuto : cuda::path_named(name);
}

// The same rows where the kernels can load 16 bytes at a time, and TMA whole boxes: it knows no repeated dimensions.
Rows aligned_rows(Tensor& tensor) {
  bool is_repeated = false;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) is_repeated |= tensor.size(dim) > 1 && tensor.stride(dim) == 0;
  if (is_repeated || !cuda::is_aligned(rows(tensor), data_type(tensor))) {
    tensor = tensor.clone(at::MemoryFormat::Contiguous);
  }
  return rows(tensor);
}

void align_inputs(AttentionProblem& problem, ProblemTensors& tensors) {
  problem.query = aligned_rows(tensors.query);
  problem.key = aligned_rows(tensors.key);
  problem.value = aligned_rows(tensors.value);
}

// The kernels' block mask (a bit for 16 x 64) as bytes for 64 x 64: bit 0 = the tile has an unmasked pair, bit 1 = it
// is live.
Tensor public_block_mask(const AttentionProblem& problem, const ProblemTensors& tensors, const Tensor& words) {
  constexpr int64_t kGroups = kPublicTile / kMaskRows;
  const auto num_tiles = [](int64_t n) { return (n + kPublicTile - 1) / kPublicTile; };
  const int64_t row_tiles = num_tiles(problem.num_queries), key_tiles = num_tiles(problem.num_keys);
  const auto integers = words.options();
  const Tensor bits = words.unsqueeze(-1).bitwise_right_shift(at::arange(32, integers)).bitwise_and(1);
  const Tensor live =
      at::constant_pad_nd(bits.flatten(-2).narrow(-1, 0, key_tiles), {0, 0, 0, row_tiles * kGroups - words.size(2)})
          .unflatten(2, {row_tiles, kGroups})
          .amax(3);

  // Of a tile without attn_mask two pairs decide: the first key is the one that most rows see, the last row the one
  // that sees most keys. With it all pairs do.
  const int64_t step = tensors.mask.defined() ? 1 : kPublicTile;
  const auto tile_starts = [&](int64_t n) { return at::arange(num_tiles(n) * kPublicTile / step, integers).mul(step); };
  const Tensor first_row = tile_starts(problem.num_queries).unsqueeze(-1), first_key = tile_starts(problem.num_keys);
  const Tensor last_row = first_row.add(step - 1).clamp_max(problem.num_queries - 1);
  Tensor is_unmasked = at::ones({first_row.size(0), first_key.size(0)}, integers.dtype(at::kBool));
  if (problem.is_causal) is_unmasked = first_key.le(last_row.add(problem.num_keys - problem.num_queries));
  if (tensors.key_lengths.defined()) {
    const Tensor lengths = tensors.key_lengths.view({-1, 1, 1, 1});
    is_unmasked = is_unmasked.logical_and(first_key.lt(lengths));
    if (problem.num_queries == problem.num_keys) is_unmasked = is_unmasked.logical_and(first_row.lt(lengths));
  }
  if (tensors.mask.defined()) {
    const Tensor& mask = tensors.mask;
    const Tensor seen = (mask.scalar_type() == at::kBool ? mask : mask.ne(-INFINITY))
                            .expand({-1, -1, problem.num_queries, problem.num_keys});
    is_unmasked =
        at::constant_pad_nd(seen, {0, first_key.size(0) - problem.num_keys, 0, first_row.size(0) - problem.num_queries})
            .logical_and(is_unmasked)
            .unflatten(3, {key_tiles, kPublicTile})
            .unflatten(2, {row_tiles, kPublicTile})
            .amax({3, 5});
  }
  return live.mul(2).add(is_unmasked).to(at::kByte);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_forward_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& key_lengths, const OptionalTensor& alpha_heads, double alpha, double scale, bool is_causal,
    bool want_aux, bool want_support) {
  const c10::DeviceGuard guard(query.device());
  cuda::Forward call;
  AttentionProblem& problem = call.problem;
  ProblemTensors tensors;
  fill_problem(problem, tensors, query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal,
               cuda::kHeadDimMultiple);
  translate_errors([&] { cuda::require_supported(problem); });
  align_inputs(problem, tensors);

  const std::array<int64_t, 3> rows_shape{problem.batch, problem.num_heads, problem.num_queries};
  const auto bytes = query.options().dtype(at::kByte);
  const Tensor out =
      at::empty({problem.batch, problem.num_heads, problem.num_queries, problem.value_head_dim}, query.options());
  const Tensor tau = at::empty(rows_shape, query.options().dtype(at::kFloat));
  // Counted where it is asked for: the backward pass does without.
  const auto counts = query.options().dtype(at::kInt);
  const Tensor support_size = want_aux ? at::empty(rows_shape, counts) : at::empty({0}, counts);
  const Tensor workspace = at::empty({cuda::forward_workspace_bytes(problem)}, bytes);
  const cuda::SupportLayout layout(problem);
  const Tensor support = at::empty({want_support ? layout.bytes : 0}, bytes);
  const Tensor mask_bytes = want_support ? support.narrow(0, 0, cuda::block_mask_bytes(problem))
                                         : at::empty({cuda::block_mask_bytes(problem)}, bytes);
  call.out = rows(out);
  if (want_support) call.gap_mean_v = layout.gap_mean_v(support.data_ptr(), problem);
  call.tau = tau.data_ptr<float>();
  if (want_aux) call.support_size = support_size.data_ptr<int32_t>();
  call.block_mask = layout.block_mask(mask_bytes.data_ptr());
  call.workspace = workspace.data_ptr();
  call.stream = current_stream(query);
  translate_errors([&] {
    call.path = requested_path();
    cuda::forward(call);
  });

  Tensor block_mask = at::empty({0}, bytes);
  if (want_aux) {
    const BlockMaskShape shape(static_cast<int>(problem.num_queries), static_cast<int>(problem.num_keys));
    const Tensor words =
        mask_bytes.view(at::kInt).view({problem.batch, problem.num_heads, shape.num_row_groups, shape.key_words()});
    block_mask = public_block_mask(problem, tensors, words);
  }
  return {unpadded_rows(out, value.size(3)), tau, support_size, block_mask, support};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cuda(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths, const OptionalTensor& alpha_heads,
    const Tensor& tau, const Tensor& support_size, const Tensor& support, double alpha, double scale, bool is_causal,
    std::array<bool, 5> wanted) {
  const c10::DeviceGuard guard(query.device());
  cuda::Backward call;
  AttentionProblem& problem = call.problem;
  ProblemTensors tensors;
  fill_problem(problem, tensors, query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal,
               cuda::kHeadDimMultiple);
  translate_errors([&] { cuda::require_supported(problem); });
  align_inputs(problem, tensors);
  const cuda::SupportLayout layout(problem);
  check_tensor(grad_out, "grad_out", {problem.batch, problem.num_heads, problem.num_queries, value.size(3)}, query);
  check_tensor(tau, "tau", {problem.batch, problem.num_heads, problem.num_queries}, query);
  check_dtype(tau, "tau", at::kFloat);
  check_tensor(support, "support", {layout.bytes}, query);
  check_dtype(support, "support", at::kByte);
  TORCH_CHECK(tau.is_contiguous() && support.is_contiguous(),
              "adasplash2: tau and the saved support must be contiguous");

  const auto gradient = [&](bool is_wanted, const Tensor& like, int64_t dim) {
    if (!is_wanted) return at::empty({0}, query.options());
    return at::empty({like.size(0), like.size(1), like.size(2), dim}, query.options());
  };
  Tensor grad_query = gradient(wanted[0], query, problem.head_dim);
  Tensor grad_key = gradient(wanted[1], key, problem.head_dim);
  Tensor grad_value = gradient(wanted[2], value, problem.value_head_dim);
  Tensor aligned_grad_out = padded_rows(grad_out.to(query.scalar_type()), cuda::kHeadDimMultiple);
  Tensor grad_mask = at::empty({0}, query.options().dtype(at::kFloat));
  if (wanted[3]) {
    // The kernels address it with the mask's own strides, so it is a mask of distinct, dense elements.
    TORCH_CHECK(attn_mask && tensors.mask.scalar_type() != at::kBool,
                "adasplash2: only a float attn_mask has a gradient");
    tensors.mask = tensors.mask.contiguous();
    problem.mask = mask_view(tensors.mask);
    grad_mask = at::empty(tensors.mask.sizes(), grad_mask.options());
    call.grad_mask = grad_mask.data_ptr<float>();
  }
  const Tensor workspace =
      at::empty({cuda::backward_workspace_bytes(problem, wanted[3])}, query.options().dtype(at::kByte));
  call.tau = tau.const_data_ptr<float>();
  call.block_mask = layout.block_mask(support.data_ptr());
  call.gap_mean_v = layout.gap_mean_v(support.data_ptr(), problem);
  call.grad_out = aligned_rows(aligned_grad_out);
  if (wanted[0]) call.grad_query = rows(grad_query);
  if (wanted[1]) call.grad_key = rows(grad_key);
  if (wanted[2]) call.grad_value = rows(grad_value);
  Tensor grad_alpha = at::empty({0}, query.options().dtype(at::kDouble));
  if (wanted[4]) {
    grad_alpha = at::empty({problem.batch, problem.num_heads}, grad_alpha.options());
    call.grad_alpha = grad_alpha.data_ptr<double>();
  }
  call.workspace = workspace.data_ptr();
  call.stream = current_stream(query);
  translate_errors([&] {
    call.path = requested_path();
    cuda::backward(call);
  });
  const auto unpadded = [](const Tensor& gradient, const Tensor& like, bool is_wanted) {
    return is_wanted ? unpadded_rows(gradient, like.size(3)) : gradient;
  };
  return {unpadded(grad_query, query, wanted[0]), unpadded(grad_key, key, wanted[1]),
          unpadded(grad_value, value, wanted[2]), grad_mask.to(query.scalar_type()), grad_alpha};
}

Tensor entmax_forward_cuda(const Tensor& x, double alpha, const OptionalTensor& alpha_slices, int64_t dim) {
  const c10::DeviceGuard guard(x.device());
  return run_entmax_forward(x, alpha, alpha_slices, dim, [&](const EntmaxForward& params) {
    translate_errors([&] { cuda::entmax_forward(params, current_stream(x)); });
  });
}

std::tuple<Tensor, Tensor> entmax_backward_cuda(const Tensor& grad_prob, const Tensor& prob, double alpha,
                                                const OptionalTensor& alpha_slices, int64_t dim,
                                                std::array<bool, 2> wanted) {
  const c10::DeviceGuard guard(prob.device());
  return run_entmax_backward(grad_prob, prob, alpha, alpha_slices, dim, wanted, [&](const EntmaxBackward& params) {
    translate_errors([&] { cuda::entmax_backward(params, current_stream(prob)); });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(adasplash2, CUDA, m) {
  m.impl("attention_forward", attention_forward_cuda);
  m.impl("attention_backward", attention_backward_cuda);
  m.impl("entmax_forward", entmax_forward_cuda);
  m.impl("entmax_backward", entmax_backward_cuda);
}

}  // namespace adasplash2
