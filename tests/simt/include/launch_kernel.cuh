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
  // All in one object: it is the only host memory that the kernel's threads read.
  using Call = std::pair<void (*)(Params...), std::tuple<std::decay_t<Params>...>>;
  const Call call(kernel, {static_cast<Params>(args)...});
  const auto run_thread = [](const void* arguments) {
    const auto& [function, values] = *static_cast<const Call*>(arguments);
    std::apply(function, values);
  };
  simt::run_grid(grid, block, smem_bytes, {run_thread, &call, sizeof call});
}

}  // namespace adasplash2
