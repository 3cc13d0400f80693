// Entry point of the attention kernel, for the emulator.
#include <launch_kernel.cuh>

#include "attention.cuh"

extern "C" int run_attention(const void* query, const void* key, const void* value, void* out, float* score,
                             int num_heads, int num_rows, float scale, int bug) {
  using namespace attention;
  return simt::entry([&] {
    const auto map = [&](const void* tensor, uint32_t box_rows) {
      const uint64_t rows = num_rows, heads = num_heads;
      return make_tensor_map({TensorMapElement::kBFloat16,
                              tensor,
                              3,
                              {kDim, rows, heads},
                              {0, kDim * 2, rows * kDim * 2},
                              {kDim, box_rows, 1},
                              128});
    };
    const dim3 grid((num_rows + kBlockM - 1) / kBlockM, num_heads);
    launch_kernel(attention_kernel, grid, dim3(kThreads), kSmemBytes, nullptr, map(query, 64), map(key, kBlockN),
                  map(value, kBlockN), map(out, 64), score, num_rows, scale, static_cast<Bug>(bug));
  });
}
