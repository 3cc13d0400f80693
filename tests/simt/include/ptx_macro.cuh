// The emulator's twin of csrc/cuda/device/ptx_macro.cuh: the statement's text goes to the interpreter (src/ptx.h).
#pragma once

#include <simt_api.h>

#define PTX(text, outputs, inputs)                                        \
  do {                                                                    \
    static ::simt::PtxStatement ptx_statement{text};                      \
    ::simt::call_ptx(ptx_statement PTX_UNPACK outputs PTX_UNPACK inputs); \
  } while (false)
#define PTX_MEMORY PTX
#define PTX_PIN(x) static_cast<void>(x)
#define PTX_UNPACK(...) __VA_OPT__(, ) __VA_ARGS__

#define PTX_OUT_R(x) ::simt::output(x, 'r')
#define PTX_OUT_F(x) ::simt::output(x, 'f')
#define PTX_INOUT_F(x) ::simt::output(x, 'f')
#define PTX_IN_R(x) ::simt::input(static_cast<uint32_t>(x), 'r')
#define PTX_IN_L(x) ::simt::input((uint64_t)(x), 'l')
#define PTX_IN_F(x) ::simt::input_float(x)
#define PTX_IN_N(x) ::simt::input(static_cast<uint32_t>(x), 'n')
