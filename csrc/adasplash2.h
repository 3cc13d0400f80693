// The seam: what a caller without torch sees of the kernels. Everything is synchronous on the CPU.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "params.h"

namespace adasplash2 {

// out_i = sum_j p_ij v_j and what the backward pass wants saved of it.
struct AttentionForward : AttentionProblem {
  Rows out;                         // (B, H, Nq, Dv)
  void* tau = nullptr;              // (B, H, Nq) contiguous, accumulation type; +inf for a row with no key
  int32_t* support_size = nullptr;  // (B, H, Nq) contiguous, number of keys with prob > 0
  uint8_t* block_mask = nullptr;    // (B, H, ceil(Nq / 64), ceil(Nk / 64)) contiguous, zero on entry, nullable:
                                    // bit 0 = the tile has an unmasked pair, bit 1 = it has prob > 0 (it is live)
  void* support = nullptr;          // support_bytes(problem) bytes, nullable: saved for the backward pass
};

struct AttentionBackward : AttentionProblem {
  const int32_t* support_size = nullptr;  // as the forward pass left it
  const void* support = nullptr;          // as the forward pass left it
  Rows grad_out;                          // (B, H, Nq, Dv)
  Rows grad_query;                        // (B, H, Nq, D), data nullable: not wanted
  Rows grad_key;                          // (B, Hkv, Nk, D), data nullable
  Rows grad_value;                        // (B, Hkv, Nk, Dv), data nullable
  void* grad_mask = nullptr;     // accumulation type, laid out like mask (its strides), zero on entry, nullable
  double* grad_alpha = nullptr;  // (B, H) contiguous, nullable
};

// entmax along the middle dimension of dense (outer, length, inner) tensors: outer * inner slices.
struct EntmaxProblem {
  DataType dtype = DataType::kFloat32;  // of every tensor but alpha and its gradient
  int64_t outer = 0;
  int64_t length = 0;
  int64_t inner = 0;
  double alpha = 1.5;                    // used where alpha_slices is null
  const double* alpha_slices = nullptr;  // (outer, inner), nullable
};

struct EntmaxForward : EntmaxProblem {
  const void* x = nullptr;  // (outer, length, inner)
  void* prob = nullptr;     // (outer, length, inner)
};

struct EntmaxBackward : EntmaxProblem {
  const void* prob = nullptr;       // (outer, length, inner), as the forward pass left it
  const void* grad_prob = nullptr;  // (outer, length, inner)
  void* grad_x = nullptr;           // (outer, length, inner), nullable: not wanted
  double* grad_alpha = nullptr;     // (outer, inner), nullable
};

// Runs body(0) .. body(num_threads - 1) at the same time; exceptions come back to the caller.
struct Parallel {
  int num_threads = 1;
  std::function<void(int num_threads, const std::function<void(int)>& body)> run;
};

namespace cpu {

// head_dim and value_head_dim must be multiples of this (the caller pads with zeros).
constexpr int64_t kHeadDimMultiple = 16;

int64_t support_bytes(const AttentionProblem& problem);
void attention_forward(const AttentionForward& params, const Parallel& parallel);
void attention_backward(const AttentionBackward& params, const Parallel& parallel);
void entmax_forward(const EntmaxForward& params, const Parallel& parallel);
void entmax_backward(const EntmaxBackward& params, const Parallel& parallel);

// Instruction sets this machine can run, slowest first, and the one in use.
std::vector<std::string> isa_levels();
std::string isa();
void set_isa(const std::string& name);

}  // namespace cpu
}  // namespace adasplash2
