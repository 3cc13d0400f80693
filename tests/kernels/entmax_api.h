// The entmax kernels as a C library for ctypes, without torch (entry.h).
#pragma once

#include "cuda/launch.h"
#include "entry.h"

using namespace adasplash2;

extern "C" int entmax_forward(const EntmaxForward* call, void* stream) {
  return entry([&] { cuda::entmax_forward(*call, stream); });
}

extern "C" int entmax_backward(const EntmaxBackward* call, void* stream) {
  return entry([&] { cuda::entmax_backward(*call, stream); });
}

// So that the mirror of these structs in Python cannot drift unnoticed.
extern "C" int64_t sizeof_entmax_forward() { return sizeof(EntmaxForward); }
extern "C" int64_t sizeof_entmax_backward() { return sizeof(EntmaxBackward); }
