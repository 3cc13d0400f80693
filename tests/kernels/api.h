// The attention kernels as a C library for ctypes, without torch (entry.h).
#pragma once

#include "cuda/launch.h"
#include "entry.h"

using namespace adasplash2;

extern "C" int attention_forward(const cuda::Forward* call) {
  return entry([&] { cuda::forward(*call); });
}

extern "C" int attention_backward(const cuda::Backward* call) {
  return entry([&] { cuda::backward(*call); });
}

extern "C" int64_t block_mask_bytes(const AttentionProblem* problem) { return cuda::block_mask_bytes(*problem); }
extern "C" int64_t forward_workspace_bytes(const AttentionProblem* problem) {
  return cuda::forward_workspace_bytes(*problem);
}
extern "C" int64_t backward_workspace_bytes(const AttentionProblem* problem, bool wants_grad_mask) {
  return cuda::backward_workspace_bytes(*problem, wants_grad_mask);
}

extern "C" int taken_path(const cuda::Forward* call) { return static_cast<int>(cuda::path_of(*call)); }

extern "C" int path_named(const char* name) {
  return entry([&] { cuda::path_named(name); });
}

// So that the mirror of these structs in Python cannot drift unnoticed.
extern "C" int64_t sizeof_forward() { return sizeof(cuda::Forward); }
extern "C" int64_t sizeof_backward() { return sizeof(cuda::Backward); }
