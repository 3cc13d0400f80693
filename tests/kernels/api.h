// The kernel layer as a C library for ctypes, without torch: compiled by nvcc for a GPU and by g++ for the emulator. A
// call returns 0, or 1 and leaves its diagnosis in simt_error() (emulator) or api_error() (GPU).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if __has_include(<simt_api.h>)
#include <simt_api.h>
using simt::entry;
#else
#include <exception>
#include <string>

static thread_local std::string last_error;

template <typename Body>
static int entry(Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

extern "C" const char* api_error() { return last_error.c_str(); }
#endif

#include "cuda/launch.h"

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
extern "C" int64_t backward_workspace_bytes(const AttentionProblem* problem) {
  return cuda::backward_workspace_bytes(*problem);
}

// So that the mirror of these structs in Python cannot drift unnoticed.
extern "C" int64_t sizeof_forward() { return sizeof(cuda::Forward); }
extern "C" int64_t sizeof_backward() { return sizeof(cuda::Backward); }
