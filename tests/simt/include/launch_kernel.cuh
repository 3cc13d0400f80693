// The emulator's twin of csrc/cuda/device/launch_kernel.cuh: runs the grid before it returns.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

namespace adasplash2 {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(what);
}

template <typename... Params, typename... Args>
void launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t, Args&&... args) {
  const std::tuple<std::decay_t<Params>...> arguments(static_cast<Params>(args)...);
  simt::run_grid(grid, block, smem_bytes, {&arguments, sizeof arguments}, [&] { std::apply(kernel, arguments); });
}

}  // namespace adasplash2
