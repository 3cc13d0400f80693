// One kernel instance as the launch layer sees it: an architecture, an element type and a head dim, pass by pass.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/pass_params.h"

namespace adasplash2::cuda {

// The order in which the blocks of a pass run, of the pass that is about to.
struct WorkOrder {
  BlockAt* blocks;      // (most blocks of a pass,) (any_arch/work_order.cuh)
  uint8_t* levels;      // (most blocks of a pass,)
  uint32_t* num_taken;  // sm90's (sm90/work_queue.cuh)
};

// What forward and backward keep in the caller's workspace.
struct ForwardWorkspace {
  float* tau_lower;       // (B, H, Nq)
  uint32_t* scan_mask;    // as the block mask
  uint16_t* tile_excess;  // (B, H, row groups, key tiles), the scan's own
  uint8_t* is_coarse;     // (B, H, Nq), how much: see encode_start()
  WorkOrder order;
};

struct BackwardWorkspace {
  float* delta;           // (B, H, Nq)
  uint32_t* column_mask;  // the block mask by columns
  float* alpha_rows;      // (B, H, Nq), where alpha_heads is there
  float* mask_slabs;      // (slabs, elements of the mask), where they are more than one
  WorkOrder order;
};

// Rows of floats and where their parts go (any_arch/split_floats.cuh).
struct SplitFloats {
  Rows rows;
  Rows parts;
  int64_t batch;
  int64_t num_heads;
  int64_t num_rows;
  int64_t dim;
  void* stream;
};

// On one stream, in the order of the members. The passes of two architectures leave the same things in the same places,
// so they can be mixed.
struct Passes {
  DataType dtype = DataType::kBFloat16;
  int head_dim = 0;
  bool (*runs_here)() = nullptr;  // has the current device the instructions? nullable: every device has them
  // float32: rows (B, heads, num_rows, dim) as the other passes but delta take them; null where they take them as they
  // are.
  void (*split_floats)(const SplitFloats&) = nullptr;
  void (*scan)(const Forward&, const ForwardWorkspace&) = nullptr;
  void (*output)(const Forward&, const ForwardWorkspace&) = nullptr;
  void (*delta)(const Backward&, const BackwardWorkspace&) = nullptr;
  void (*grad_query)(const Backward&, const BackwardWorkspace&) = nullptr;
  void (*grad_key_value)(const Backward&, const BackwardWorkspace&) = nullptr;
  void (*grad_alpha)(const Backward&, const BackwardWorkspace&) = nullptr;
  void (*grad_mask)(const Backward&, const BackwardWorkspace&) = nullptr;
};

namespace sm80 {
// One definition a file in instances/.
extern const Passes bfloat16_64, bfloat16_128, bfloat16_256;
extern const Passes float16_64, float16_128, float16_256;
extern const Passes float32_64, float32_128, float32_256;
}  // namespace sm80

namespace sm90 {
// The same, where the build has them. A pass that is null is the sm80 one.
extern const Passes bfloat16_64, bfloat16_128;
extern const Passes float16_64, float16_128;
}  // namespace sm90

}  // namespace adasplash2::cuda
