// torch's threads as the kernels see them.
#pragma once

#include <ATen/Parallel.h>

#include "adasplash2.h"

namespace adasplash2 {

inline Parallel torch_threads() {
  return {at::get_num_threads(), [](int num_threads, const std::function<void(int)>& body) {
            at::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
            });
          }};
}

}  // namespace adasplash2
