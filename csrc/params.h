// The whole interface between torch and the kernels: plain data, no torch type, no ownership.
//
// Names and symbols are those of docs/algorithm.md. Every stride is in elements; the last dimension of
// query, key, value, out and of their gradients is contiguous. Nullable pointers say so.
#pragma once

#include <cstdint>

namespace adasplash2 {

enum class DataType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kBool };

constexpr int64_t size_of(DataType dtype) {
  return dtype == DataType::kFloat64 ? 8 : dtype == DataType::kFloat32 ? 4 : dtype == DataType::kBool ? 1 : 2;
}

// A (batch, head, row, dim) tensor whose last dimension is contiguous.
struct Rows {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_row = 0;
};

// A (B, H, Nq, Nk) mask; a broadcast dimension has stride 0.
// kBool: true = the key takes part. Any other dtype: added to the score, before the factor alpha - 1.
struct Mask {
  const void* data = nullptr;  // nullable: no mask
  DataType dtype = DataType::kBool;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_row = 0;
  int64_t stride_col = 0;
};

// What forward and backward have in common: the operation itself.
struct AttentionProblem {
  DataType dtype = DataType::kFloat32;  // of query, key, value, out and their gradients
  int64_t batch = 0;
  int64_t num_heads = 0;     // of query
  int64_t num_kv_heads = 0;  // divides num_heads; query head h reads kv head h / (num_heads / num_kv_heads)
  int64_t num_queries = 0;   // Nq
  int64_t num_keys = 0;      // Nk
  int64_t head_dim = 0;      // D, of query and key
  int64_t value_head_dim = 0;

  Rows query;  // (B, H,   Nq, D)
  Rows key;    // (B, Hkv, Nk, D)
  Rows value;  // (B, Hkv, Nk, Dv)

  Mask mask;
  const int64_t* key_lengths = nullptr;  // (B,), nullable: keys at and past the length take no part;
                                         // when Nq == Nk query rows at and past it are padding too (zero)
  double scale = 1.0;                    // sigma
  bool is_causal = false;                // key j is seen by query i when j <= i + Nk - Nq (bottom right)

  double alpha = 1.5;                   // used where alpha_heads is null
  const double* alpha_heads = nullptr;  // (B, H) by the two strides below, nullable
  int64_t alpha_stride_batch = 0;
  int64_t alpha_stride_head = 0;
};

}  // namespace adasplash2
