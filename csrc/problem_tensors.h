// The inputs of the attention operators: tensors -> AttentionProblem, the same for every device.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>

#include "check_tensor.h"
#include "params.h"

namespace adasplash2 {

struct ProblemTensors {  // keeps what the params point at alive
  at::Tensor query, key, value, mask, key_lengths, alpha_heads;
};

// Checks the inputs; head dims that are no multiple of `head_dim_multiple` are padded with zeros.
inline void fill_problem(AttentionProblem& problem, ProblemTensors& tensors, const at::Tensor& query,
                         const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& attn_mask,
                         const std::optional<at::Tensor>& key_lengths, const std::optional<at::Tensor>& alpha_heads,
                         double alpha, double scale, bool is_causal, int64_t head_dim_multiple) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                    "adasplash2: query, key and value must have 4 dimensions, got ", query.dim(), ", ", key.dim(),
                    " and ", value.dim());
  check_floating_point(query, "query");
  const int64_t batch = query.size(0), num_heads = query.size(1), num_kv_heads = key.size(1);
  const int64_t num_queries = query.size(2), num_keys = key.size(2), head_dim = query.size(3);
  check_tensor(key, "key", {batch, num_kv_heads, num_keys, head_dim}, query);
  check_tensor(value, "value", {batch, num_kv_heads, num_keys, value.size(3)}, query);
  check_dtype(key, "key", query.scalar_type());
  check_dtype(value, "value", query.scalar_type());
  TORCH_CHECK_VALUE(num_kv_heads == num_heads || (num_kv_heads > 0 && num_heads % num_kv_heads == 0),
                    "adasplash2: the number of query heads must be a multiple of the number of key heads, got ",
                    num_heads, " and ", num_kv_heads);
  problem.dtype = data_type(query);
  problem.batch = batch;
  problem.num_heads = num_heads;
  problem.num_kv_heads = num_kv_heads;
  problem.num_queries = num_queries;
  problem.num_keys = num_keys;
  tensors.query = padded_rows(query, head_dim_multiple);
  tensors.key = padded_rows(key, head_dim_multiple);
  tensors.value = padded_rows(value, head_dim_multiple);
  problem.head_dim = tensors.query.size(3);
  problem.value_head_dim = tensors.value.size(3);
  problem.query = rows(tensors.query);
  problem.key = rows(tensors.key);
  problem.value = rows(tensors.value);
  if (attn_mask) {
    tensors.mask = *attn_mask;
    TORCH_CHECK_VALUE(tensors.mask.dim() == 4, "adasplash2: attn_mask must have 4 dimensions, got ",
                      tensors.mask.dim());
    const std::array<int64_t, 4> full{batch, num_heads, num_queries, num_keys};
    for (int64_t dim = 0; dim < 4; ++dim) {
      TORCH_CHECK_VALUE(tensors.mask.size(dim) == 1 || tensors.mask.size(dim) == full[dim],
                        "adasplash2: attn_mask must broadcast to ", at::IntArrayRef(full), ", got ",
                        tensors.mask.sizes());
    }
    TORCH_CHECK_TYPE(tensors.mask.scalar_type() == at::kBool || tensors.mask.scalar_type() == query.scalar_type(),
                     "adasplash2: attn_mask must be bool or have the dtype of query (", query.scalar_type(), "), got ",
                     tensors.mask.scalar_type());
    problem.mask = mask_view(tensors.mask);
  }
  if (key_lengths) {
    check_tensor(*key_lengths, "key_lengths", {batch}, query);
    tensors.key_lengths = key_lengths->to(at::kLong).contiguous();
    problem.key_lengths = tensors.key_lengths.const_data_ptr<int64_t>();
  }
  if (alpha_heads) {
    check_tensor(*alpha_heads, "alpha", {batch, num_heads}, query);
    check_dtype(*alpha_heads, "alpha", at::kDouble);
    check_alphas(*alpha_heads);
    tensors.alpha_heads = *alpha_heads;
    problem.alpha_heads = tensors.alpha_heads.const_data_ptr<double>();
    problem.alpha_stride_batch = tensors.alpha_heads.stride(0);
    problem.alpha_stride_head = tensors.alpha_heads.stride(1);
  } else {
    check_alpha(alpha);
  }
  problem.alpha = alpha;
  problem.scale = scale;
  problem.is_causal = is_causal;
}

}  // namespace adasplash2
