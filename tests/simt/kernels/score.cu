// Entry point of the score kernel, for the emulator.
#include <launch_kernel.cuh>

#include "score.cuh"

extern "C" int run_score(const __nv_bfloat16* query, const __nv_bfloat16* key, float* row_max, unsigned* histogram,
                         int num_heads, int num_rows, float scale, float low, float inverse_width, int bug) {
  return simt::entry([&] {
    const dim3 grid((num_rows + score::kRows - 1) / score::kRows, num_heads);
    adasplash2::launch_kernel(score::score_kernel, grid, dim3(score::kThreads), score::kSmemBytes, nullptr, query, key,
                              row_max, histogram, num_rows, scale, low, inverse_width, static_cast<score::Bug>(bug));
  });
}
