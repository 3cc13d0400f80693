// Forward and backward on a CUDA stream, for a caller that owns all memory. Nothing here allocates, waits for the
// device or synchronises, so both can be captured in a graph. Every pointer is to device memory of the stream's device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "adasplash2.h"
#include "params.h"

namespace adasplash2::cuda {

// Which kernels: those for Hopper where they run and cover the case, else those for every GPU from Ampere on; or, for
// tests and measurements, one of the two.
enum class Path : int32_t { kAuto, kSm80, kSm90 };

struct Forward {
  AttentionProblem problem;
  Rows out;         // (B, H, Nq, Dv)
  Rows gap_mean_v;  // (B, H, Nq, Dv), data nullable: saved for the backward pass
  // (B, H, Nq) contiguous; +inf for a row without keys, NaN for a row with a NaN score. As near as out needs it where
  // neither gap_mean_v nor support_size is wanted.
  float* tau = nullptr;
  int32_t* support_size = nullptr;  // (B, H, Nq) contiguous, nullable: keys with gap > 0 before the last step for tau
  uint32_t* block_mask = nullptr;   // block_mask_bytes(problem), by rows (math/block_mask.h)
  void* workspace = nullptr;  // forward_workspace_bytes(problem), 16-byte aligned; free again once the pass is done
  void* stream = nullptr;     // cudaStream_t
  Path path = Path::kAuto;
};

struct Backward {
  AttentionProblem problem;
  const float* tau = nullptr;            // these three as the forward pass left them
  const uint32_t* block_mask = nullptr;  //
  Rows gap_mean_v;                       //
  Rows grad_out;                         // (B, H, Nq, Dv)
  Rows grad_query;                       // (B, H, Nq, D), data nullable: not wanted
  Rows grad_key;                         // (B, Hkv, Nk, D), data nullable
  Rows grad_value;                       // (B, Hkv, Nk, Dv), data nullable
  double* grad_alpha = nullptr;          // (B, H) contiguous, nullable; only where problem.alpha_heads is there
  float* grad_mask = nullptr;            // nullable; only where problem.mask is dense floats, laid out like it
  void* workspace = nullptr;             // backward_workspace_bytes(problem, ...), 16-byte aligned
  void* stream = nullptr;                // cudaStream_t
  Path path = Path::kAuto;
};

int64_t block_mask_bytes(const AttentionProblem& problem);
int64_t forward_workspace_bytes(const AttentionProblem& problem);
int64_t backward_workspace_bytes(const AttentionProblem& problem, bool wants_grad_mask);

// Rows must start on 16 bytes and their strides be multiples of 16 bytes; the caller copies others.
bool is_aligned(const Rows& rows, DataType dtype);

// No rows of query is nothing to do, no keys is rows without keys; other empty tensors are the caller's.
// Throws NotBuilt, naming the option, for what these kernels cannot do, std::invalid_argument for what nothing can.
void require_supported(const AttentionProblem& problem);

// The path that forward and backward take on the current device, kSm80 or kSm90. Throws NotBuilt where the one that the
// call asks for cannot be taken.
Path path_of(const Forward& call);
Path path_of(const Backward& call);

// "auto", "sm80", "sm90": the names of Path, in its order. The paths that this build has, whatever the device.
Path path_named(const std::string& name);
std::vector<std::string> built_paths();

void forward(const Forward& call);
void backward(const Backward& call);

// entmax of a tensor, any float dtype; on the stream `stream` (cudaStream_t).
void entmax_forward(const EntmaxForward& call, void* stream);
void entmax_backward(const EntmaxBackward& call, void* stream);

}  // namespace adasplash2::cuda
