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
