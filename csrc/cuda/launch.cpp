#include "cuda/launch.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <string>

#include "cuda/config.h"
#include "cuda/pass_params.h"
#include "cuda/passes.h"
#include "error.h"
#include "math/histogram.h"

namespace adasplash2::cuda {
namespace {

constexpr int64_t kAlignment = 16;
constexpr int64_t kLargestGridYZ = 65535;

int64_t align_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t num_heads_in_all(const AttentionProblem& problem) { return problem.batch * problem.num_heads; }
int64_t num_rows_in_all(const AttentionProblem& problem) { return num_heads_in_all(problem) * problem.num_queries; }

int64_t tile_excess_bytes(const AttentionProblem& problem) {
  const BlockMaskShape shape = mask_shape(problem);
  return num_heads_in_all(problem) * shape.num_row_groups * shape.num_key_tiles * int64_t(sizeof(uint16_t));
}

int64_t column_mask_bytes(const AttentionProblem& problem) {
  return num_heads_in_all(problem) * mask_shape(problem).column_words() * int64_t(sizeof(uint32_t));
}

// For as many blocks as a pass may have, as no block has fewer than 64 rows or keys and 64 columns, or as many of both
// together.
struct WorkOrderLayout {
  int64_t num_blocks;

  explicit WorkOrderLayout(const AttentionProblem& problem) {
    const int64_t num_chunks = instance_head_dim(problem) / 64;
    const int64_t row_blocks = problem.num_heads * ceil_div<int64_t>(problem.num_queries, 64);
    const int64_t key_blocks = problem.num_kv_heads * ceil_div<int64_t>(problem.num_keys, 64);
    num_blocks = problem.batch * num_chunks * std::max(row_blocks, key_blocks);
  }
  int64_t index_bytes() const { return align_up(num_blocks * int64_t(sizeof(BlockAt))); }
  int64_t level_bytes() const { return align_up(num_blocks); }
  int64_t num_bytes() const { return index_bytes() + level_bytes() + align_up(int64_t(sizeof(uint32_t))); }
  WorkOrder at(uint8_t* bytes) const {
    return {reinterpret_cast<BlockAt*>(bytes), bytes + index_bytes(),
            reinterpret_cast<uint32_t*>(bytes + index_bytes() + level_bytes())};
  }
};

constexpr std::array<const char*, 3> kPathNames{"auto", "sm80", "sm90"};

using Instances = std::initializer_list<const Passes*>;

constexpr Instances kPortableInstances{&sm80::bfloat16_64, &sm80::bfloat16_128, &sm80::bfloat16_256,
                                       &sm80::float16_64,  &sm80::float16_128,  &sm80::float16_256,
                                       &sm80::float32_64,  &sm80::float32_128,  &sm80::float32_256};
#ifdef ADASPLASH2_CUDA_SM90
constexpr Instances kHopperInstances{&sm90::bfloat16_64, &sm90::bfloat16_128, &sm90::float16_64, &sm90::float16_128};
#else
constexpr Instances kHopperInstances{};
#endif
constexpr bool kHasSm90 = kHopperInstances.size() > 0;

const Passes* find_instance(Instances instances, const AttentionProblem& problem) {
  const int head_dim = instance_head_dim(problem);
  for (const Passes* passes : instances) {
    if (passes->dtype == problem.dtype && passes->head_dim == head_dim) return passes;
  }
  return nullptr;
}

// A tensor of the call: TMA reads and writes it through a map of its sizes and strides.
struct Operand {
  const Rows& rows;
  int64_t num_rows;
  int64_t num_heads;
};

// TMA's strides are below 2^40 bytes, and a dimension that is repeated has none. (Multiples of 16 bytes they are
// anyway: is_aligned().)
bool is_tma_operand(const Operand& operand, const AttentionProblem& problem) {
  constexpr int64_t kStrideEnd = int64_t(1) << 40;
  const auto fits = [&](int64_t stride, int64_t size) {
    return size == 1 || (stride > 0 && stride < kStrideEnd / size_of(problem.dtype));
  };
  const Rows& rows = operand.rows;
  return rows.data == nullptr || (fits(rows.stride_row, operand.num_rows) &&
                                  fits(rows.stride_head, operand.num_heads) && fits(rows.stride_batch, problem.batch));
}

// Why the sm90 kernels cannot run, for users; null if they can.
const char* why_not_sm90(const AttentionProblem& problem, std::initializer_list<Operand> operands) {
  if (!kHasSm90) return "this build has no code for sm_90a";
  const Passes* passes = find_instance(kHopperInstances, problem);
  if (passes == nullptr) return "they take bfloat16 and float16, head dims up to 128";
  if (problem.num_queries == 0 || problem.num_keys == 0) return "there are no queries or no keys";
  if (problem.mask.data != nullptr) return "they have no attn_mask";
  if (!(problem.scale > 0.0)) return "the scale is not positive";
  for (const Operand& operand : operands) {
    if (!is_tma_operand(operand, problem)) return "TMA cannot take the strides";
  }
  if (!passes->runs_here()) return "the GPU is not of compute capability 9.0";
  return nullptr;
}

Path choose_path(Path path, const AttentionProblem& problem, std::initializer_list<Operand> operands) {
  if (path == Path::kSm80) return path;
  const char* const reason = why_not_sm90(problem, operands);
  if (reason == nullptr) return Path::kSm90;
  if (path == Path::kSm90) throw NotBuilt(std::string("adasplash2: the sm90 kernels cannot run here: ") + reason);
  return Path::kSm80;
}

// The passes of a path, pass by pass: what the sm90 one lacks is the sm80 one's.
Passes find_passes(const AttentionProblem& problem, Path path) {
  const Passes* const portable = find_instance(kPortableInstances, problem);
  if (portable == nullptr) throw NotBuilt("adasplash2: no CUDA kernels for this dtype and these head dims");
  Passes passes = *portable;
  if (path == Path::kSm90) {
    const Passes& hopper = *find_instance(kHopperInstances, problem);
    const auto take = [](auto& pass, auto other) { pass = other == nullptr ? pass : other; };
    take(passes.scan, hopper.scan);
    take(passes.output, hopper.output);
    take(passes.delta, hopper.delta);
    take(passes.grad_query, hopper.grad_query);
    take(passes.grad_key_value, hopper.grad_key_value);
  }
  return passes;
}

// float32 tensors in parts, if the passes want them so: they lie in the workspace from `bytes` on.
struct Splitter {
  const Passes& passes;
  const AttentionProblem& problem;
  void* stream;
  uint8_t* bytes;

  static int64_t num_bytes(const AttentionProblem& problem, int64_t num_heads, int64_t num_rows, int64_t dim) {
    constexpr int64_t kPartBytes = 2;
    const bool is_split = problem.dtype == DataType::kFloat32;
    return is_split ? align_up(problem.batch * num_heads * num_rows * dim * kFloatParts * kPartBytes) : 0;
  }
  static int64_t queries_bytes(const AttentionProblem& problem, int64_t dim) {
    return num_bytes(problem, problem.num_heads, problem.num_queries, dim);
  }
  static int64_t inputs_bytes(const AttentionProblem& problem) {
    return queries_bytes(problem, problem.head_dim) +
           num_bytes(problem, problem.num_kv_heads, problem.num_keys, problem.head_dim) +
           num_bytes(problem, problem.num_kv_heads, problem.num_keys, problem.value_head_dim);
  }

  Rows split(const Rows& rows, int64_t num_heads, int64_t num_rows, int64_t dim) {
    if (passes.split_floats == nullptr) return rows;
    const int64_t stride_row = kFloatParts * dim, stride_head = num_rows * stride_row;
    const Rows parts{bytes, num_heads * stride_head, stride_head, stride_row};
    passes.split_floats({rows, parts, problem.batch, num_heads, num_rows, dim, stream});
    bytes += num_bytes(problem, num_heads, num_rows, dim);
    return parts;
  }
  Rows split_queries(const Rows& rows, int64_t dim) { return split(rows, problem.num_heads, problem.num_queries, dim); }
  AttentionProblem split_inputs() {
    AttentionProblem result = problem;
    result.query = split_queries(problem.query, problem.head_dim);
    result.key = split(problem.key, problem.num_kv_heads, problem.num_keys, problem.head_dim);
    result.value = split(problem.value, problem.num_kv_heads, problem.num_keys, problem.value_head_dim);
    return result;
  }
};

void require_aligned(const Rows& rows, DataType dtype, const char* name) {
  require(is_aligned(rows, dtype), std::string(name) + ": rows must be 16-byte aligned");
}

void require_present(const Rows& rows, DataType dtype, const char* name) {
  require(rows.data != nullptr, std::string(name) + " is missing");
  require_aligned(rows, dtype, name);
}

void require_inputs(const AttentionProblem& problem) {
  if (problem.num_queries > 0) require_present(problem.query, problem.dtype, "query");
  if (problem.num_keys == 0) return;
  require_present(problem.key, problem.dtype, "key");
  require_present(problem.value, problem.dtype, "value");
}

}  // namespace

bool is_aligned(const Rows& rows, DataType dtype) {
  const int64_t size = size_of(dtype);
  return reinterpret_cast<uintptr_t>(rows.data) % kAlignment == 0 && rows.stride_batch * size % kAlignment == 0 &&
         rows.stride_head * size % kAlignment == 0 && rows.stride_row * size % kAlignment == 0;
}

int64_t block_mask_bytes(const AttentionProblem& problem) {
  return num_heads_in_all(problem) * mask_shape(problem).row_words() * int64_t(sizeof(uint32_t));
}

int64_t forward_workspace_bytes(const AttentionProblem& problem) {
  const int64_t num_rows = num_rows_in_all(problem);
  return align_up(num_rows * int64_t(sizeof(float))) + align_up(block_mask_bytes(problem)) + align_up(num_rows) +
         align_up(tile_excess_bytes(problem)) + WorkOrderLayout(problem).num_bytes() + Splitter::inputs_bytes(problem);
}

int64_t backward_workspace_bytes(const AttentionProblem& problem, bool wants_grad_mask) {
  const int64_t row_bytes = align_up(num_rows_in_all(problem) * int64_t(sizeof(float)));
  return row_bytes + align_up(column_mask_bytes(problem)) + (problem.alpha_heads == nullptr ? 0 : row_bytes) +
         (wants_grad_mask ? align_up(GradMaskWork(problem).slab_bytes()) : 0) + WorkOrderLayout(problem).num_bytes() +
         Splitter::inputs_bytes(problem) + Splitter::queries_bytes(problem, problem.value_head_dim);
}

void require_supported(const AttentionProblem& problem) {
  const auto not_built = [](const std::string& message) { throw NotBuilt("adasplash2: " + message); };
  if (problem.dtype != DataType::kBFloat16 && problem.dtype != DataType::kFloat16 &&
      problem.dtype != DataType::kFloat32) {
    not_built("dtype: the CUDA kernels take bfloat16, float16 and float32");
  }
  const DataType mask_dtype = problem.mask.dtype;
  require(problem.mask.data == nullptr || mask_dtype == DataType::kBool || mask_dtype == problem.dtype,
          "attn_mask must be bool or of the dtype of query");
  if (!std::isfinite(problem.scale)) not_built("scale must be finite on CUDA");
  const int64_t largest_dim = std::max(problem.head_dim, problem.value_head_dim);
  if (largest_dim > kLargestHeadDim) not_built("head dims above 256 are not built for CUDA");
  require(problem.head_dim > 0 && problem.value_head_dim > 0, "head dims must be positive");
  if (problem.head_dim % 8 != 0 || problem.value_head_dim % 8 != 0) {
    not_built("head dims that are not multiples of 8 are not built for CUDA");
  }
  if (problem.num_queries > kMaxKeys || problem.num_keys > kMaxKeys) not_built("more than 2^20 queries or keys");
  if (problem.batch > kLargestGridYZ || 2 * problem.num_heads > kLargestGridYZ)
    not_built("more than 2^15 heads or 2^16 sequences");
  require(problem.num_kv_heads > 0 && problem.num_heads % problem.num_kv_heads == 0,
          "the heads of query must be a multiple of those of key and value");
  require(problem.alpha_heads != nullptr || (problem.alpha > 1.0 && problem.alpha <= 2.0), "alpha must be in (1, 2]");
}

Path path_of(const Forward& call) {
  const AttentionProblem& problem = call.problem;
  const int64_t num_queries = problem.num_queries, num_keys = problem.num_keys;
  return choose_path(call.path, problem,
                     {{problem.query, num_queries, problem.num_heads},
                      {problem.key, num_keys, problem.num_kv_heads},
                      {problem.value, num_keys, problem.num_kv_heads},
                      {call.out, num_queries, problem.num_heads},
                      {call.gap_mean_v, num_queries, problem.num_heads}});
}

Path path_of(const Backward& call) {
  const AttentionProblem& problem = call.problem;
  const int64_t num_queries = problem.num_queries, num_keys = problem.num_keys;
  return choose_path(call.path, problem,
                     {{problem.query, num_queries, problem.num_heads},
                      {problem.key, num_keys, problem.num_kv_heads},
                      {problem.value, num_keys, problem.num_kv_heads},
                      {call.gap_mean_v, num_queries, problem.num_heads},
                      {call.grad_out, num_queries, problem.num_heads},
                      {call.grad_query, num_queries, problem.num_heads},
                      {call.grad_key, num_keys, problem.num_kv_heads},
                      {call.grad_value, num_keys, problem.num_kv_heads}});
}

Path path_named(const std::string& name) {
  const auto found = std::find(kPathNames.begin(), kPathNames.end(), name);
  require(found != kPathNames.end(), "the CUDA path must be auto, sm80 or sm90, got " + name);
  return static_cast<Path>(found - kPathNames.begin());
}

std::vector<std::string> built_paths() {
  return kHasSm90 ? std::vector<std::string>{"sm80", "sm90"} : std::vector<std::string>{"sm80"};
}

void forward(const Forward& given) {
  Forward call = given;
  const AttentionProblem& problem = given.problem;
  require_supported(problem);
  if (num_rows_in_all(problem) == 0) return;
  require_inputs(problem);
  require_present(call.out, problem.dtype, "out");
  require_aligned(call.gap_mean_v, problem.dtype, "gap_mean_v");

  uint8_t* bytes = static_cast<uint8_t*>(call.workspace);
  ForwardWorkspace workspace;
  workspace.tau_lower = reinterpret_cast<float*>(bytes);
  bytes += align_up(num_rows_in_all(problem) * int64_t(sizeof(float)));
  workspace.scan_mask = reinterpret_cast<uint32_t*>(bytes);
  bytes += align_up(block_mask_bytes(problem));
  workspace.is_coarse = bytes;
  bytes += align_up(num_rows_in_all(problem));
  workspace.tile_excess = reinterpret_cast<uint16_t*>(bytes);

  bytes += align_up(tile_excess_bytes(problem));
  workspace.order = WorkOrderLayout(problem).at(bytes);
  bytes += WorkOrderLayout(problem).num_bytes();

  const Passes passes = find_passes(problem, path_of(call));
  call.problem = Splitter{passes, problem, call.stream, bytes}.split_inputs();
  passes.scan(call, workspace);
  passes.output(call, workspace);
}

void backward(const Backward& given) {
  Backward call = given;
  const AttentionProblem& problem = given.problem;
  require_supported(problem);
  if (num_heads_in_all(problem) == 0) return;
  require_inputs(problem);
  if (problem.num_queries > 0) {
    require_present(call.gap_mean_v, problem.dtype, "gap_mean_v");
    require_present(call.grad_out, problem.dtype, "grad_out");
  }
  require_aligned(call.grad_query, problem.dtype, "grad_query");
  require_aligned(call.grad_key, problem.dtype, "grad_key");
  require_aligned(call.grad_value, problem.dtype, "grad_value");
  require(call.grad_alpha == nullptr || problem.alpha_heads != nullptr, "only a tensor alpha has a gradient");
  require(call.grad_mask == nullptr || (problem.mask.data != nullptr && problem.mask.dtype != DataType::kBool),
          "only a float attn_mask has a gradient");
  require(call.grad_mask == nullptr || problem.mask.stride_col <= 1, "an attn_mask with a gradient must be dense");

  uint8_t* bytes = static_cast<uint8_t*>(call.workspace);
  BackwardWorkspace workspace;
  workspace.delta = reinterpret_cast<float*>(bytes);
  bytes += align_up(num_rows_in_all(problem) * int64_t(sizeof(float)));
  workspace.column_mask = reinterpret_cast<uint32_t*>(bytes);
  bytes += align_up(column_mask_bytes(problem));
  workspace.alpha_rows = reinterpret_cast<float*>(bytes);
  if (problem.alpha_heads != nullptr) bytes += align_up(num_rows_in_all(problem) * int64_t(sizeof(float)));
  workspace.mask_slabs = reinterpret_cast<float*>(bytes);
  if (call.grad_mask != nullptr) bytes += align_up(GradMaskWork(problem).slab_bytes());
  workspace.order = WorkOrderLayout(problem).at(bytes);
  bytes += WorkOrderLayout(problem).num_bytes();

  const Passes passes = find_passes(problem, path_of(call));
  if (problem.num_queries > 0) passes.delta(call, workspace);
  Splitter splitter{passes, problem, call.stream, bytes};
  call.problem = splitter.split_inputs();
  call.grad_out = splitter.split_queries(call.grad_out, problem.value_head_dim);
  if (problem.num_queries > 0) {
    if (call.grad_query.data != nullptr) passes.grad_query(call, workspace);
  }
  if (problem.num_keys > 0 && (call.grad_key.data != nullptr || call.grad_value.data != nullptr)) {
    passes.grad_key_value(call, workspace);
  }
  if (call.grad_alpha != nullptr) passes.grad_alpha(call, workspace);
  if (call.grad_mask != nullptr) passes.grad_mask(call, workspace);
}

}  // namespace adasplash2::cuda
