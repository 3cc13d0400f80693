// PTX(): one inline PTX statement. This is what nvcc sees; the emulator's twin (tests/simt/include/ptx_macro.cuh) hands
// the same text to an interpreter, so the wrappers in csrc/cuda/ptx are written once and their text runs without a GPU.
//
//   PTX(text, (outputs), (inputs))          the statement works on registers alone
//   PTX_MEMORY(text, (outputs), (inputs))   it touches or orders memory: no load or store moves across it
//   PTX_PIN(x)                              no instruction; the compiler moves no access of the float x across it
//
// An operand is PTX_OUT_x, PTX_INOUT_x or PTX_IN_x, with x the asm constraint: R 32-bit, L 64-bit, F float, N constant.
#pragma once

#define PTX(text, outputs, inputs) asm volatile(text : PTX_UNPACK outputs : PTX_UNPACK inputs)
#define PTX_MEMORY(text, outputs, inputs) asm volatile(text : PTX_UNPACK outputs : PTX_UNPACK inputs : "memory")
#define PTX_PIN(x) asm volatile("" : "+f"(x) : : "memory")
#define PTX_UNPACK(...) __VA_ARGS__

#define PTX_OUT_R(x) "=r"(x)
#define PTX_OUT_F(x) "=f"(x)
#define PTX_INOUT_F(x) "+f"(x)
#define PTX_IN_R(x) "r"(x)
#define PTX_IN_L(x) "l"(x)
#define PTX_IN_F(x) "f"(x)
#define PTX_IN_N(x) "n"(x)
