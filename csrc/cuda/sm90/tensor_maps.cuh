// Tensor maps of (batch, head, row, dim) tensors, made on the host.
#pragma once

#include <cstdint>
#include <tensor_map.cuh>

#include "cuda/sm90/smem_tile.cuh"
#include "cuda/tensor_map_cache.h"
#include "params.h"

namespace adasplash2::cuda::sm90 {

// Boxes of box_rows rows x one panel, with the swizzle of SmemTile. Dimensions: dim, row, head, batch. Made once for
// tensors of one address, shape and strides.
inline TensorMap rows_map(const Rows& rows, DataType dtype, int64_t dim, int64_t num_rows, int64_t num_heads,
                          int64_t batch, int box_rows) {
  const int64_t bytes = size_of(dtype);
  const auto step = [&](int64_t stride, int64_t size) {  // the stride of a dimension of one is any
    return static_cast<uint64_t>(size > 1 ? stride * bytes : 16);
  };
  TensorMapShape shape{};
  shape.element = dtype == DataType::kBFloat16 ? TensorMapElement::kBFloat16 : TensorMapElement::kFloat16;
  shape.base = rows.data;
  shape.rank = 4;
  const int64_t sizes[] = {dim, num_rows, num_heads, batch};
  const int64_t strides[] = {1, rows.stride_row, rows.stride_head, rows.stride_batch};
  const int boxes[] = {kPanelCols, box_rows, 1, 1};
  for (int i = 0; i < shape.rank; ++i) {
    shape.size[i] = static_cast<uint64_t>(sizes[i]);
    shape.stride_bytes[i] = i == 0 ? static_cast<uint64_t>(bytes) : step(strides[i], sizes[i]);
    shape.box[i] = static_cast<uint32_t>(boxes[i]);
  }
  shape.swizzle_bytes = kPanelRowBytes;
  static thread_local TensorMapCache<TensorMap> cache;
  return cache.find(shape, make_tensor_map);
}

// Of a tensor with the rows and heads of query, and of one with those of key.
inline TensorMap query_rows_map(const AttentionProblem& problem, const Rows& rows, int64_t dim, int box_rows) {
  return rows_map(rows, problem.dtype, dim, problem.num_queries, problem.num_heads, problem.batch, box_rows);
}
inline TensorMap key_rows_map(const AttentionProblem& problem, const Rows& rows, int64_t dim, int box_rows) {
  return rows_map(rows, problem.dtype, dim, problem.num_keys, problem.num_kv_heads, problem.batch, box_rows);
}

}  // namespace adasplash2::cuda::sm90
