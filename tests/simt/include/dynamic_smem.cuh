// The emulator's twin of csrc/cuda/device/dynamic_smem.cuh.
#pragma once

#include <simt_api.h>

namespace adasplash2 {

inline uint8_t* dynamic_smem() { return simt::shared_memory(); }

}  // namespace adasplash2
