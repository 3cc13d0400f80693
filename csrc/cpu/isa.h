// One entry point per kernel and instruction set; launch.cpp chooses the table at run time.
#pragma once

#include "adasplash2.h"

namespace adasplash2::cpu {

struct KernelTable {
  const char* isa;
  void (*attention_forward)(const AttentionForward&, const Parallel&);
  void (*attention_backward)(const AttentionBackward&, const Parallel&);
  void (*entmax_forward)(const EntmaxForward&, const Parallel&);
  void (*entmax_backward)(const EntmaxBackward&, const Parallel&);
};

namespace baseline {
extern const KernelTable kKernels;
}
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}

}  // namespace adasplash2::cpu
