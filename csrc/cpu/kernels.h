// All CPU kernels, compiled for the instruction set that the including file has chosen.
#pragma once

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/entmax.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

#define ADASPLASH2_STRING_(x) #x
#define ADASPLASH2_STRING(x) ADASPLASH2_STRING_(x)

const KernelTable kKernels = {ADASPLASH2_STRING(ADASPLASH2_ISA), attention_forward, attention_backward, entmax_forward,
                              entmax_backward};

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
