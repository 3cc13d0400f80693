#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <launch_kernel.cuh>

#include "cuda/any_arch/entmax.cuh"
#include "cuda/launch.h"
#include "error.h"

namespace adasplash2::cuda {
namespace {

constexpr int64_t kMostBlocks = 1 << 16;  // the kernels go on with the next slices by themselves

template <typename Params, typename Call>
void launch(void (*kernel)(Params), const Call& call, size_t smem_bytes, void* stream) {
  const Params params{call, SliceTeams::of(call)};
  const int64_t slices = params.teams.num_slices;
  const int64_t line = call.inner == 1 ? call.outer : call.inner, num_lines = call.inner == 1 ? 1 : call.outer;
  const int64_t num_blocks = std::min(num_lines * ((line + slices - 1) / slices), kMostBlocks);
  launch_kernel(kernel, dim3(static_cast<unsigned>(num_blocks)), dim3(kEntmaxThreads), smem_bytes,
                static_cast<cudaStream_t>(stream), params);
}

struct ForwardPass {
  template <typename Element, AlphaKind kKind>
  static void run(const EntmaxForward& call, void* stream) {
    launch(entmax_forward_kernel<Element, kKind>, call, sizeof(EntmaxForwardSmem<EntmaxReal<Element>>), stream);
  }
};

struct BackwardPass {
  template <typename Element, AlphaKind kKind>
  static void run(const EntmaxBackward& call, void* stream) {
    launch(entmax_backward_kernel<Element, kKind>, call, kEntmaxThreads * sizeof(GradSums<EntmaxReal<Element>>),
           stream);
  }
};

template <typename Pass, typename Element, typename Call>
void run_kind(const Call& call, void* stream) {
  // alphas by slice are known to the device only.
  switch (call.alpha_slices == nullptr ? alpha_kind(call.alpha) : AlphaKind::kGeneral) {
    case AlphaKind::kOneAndHalf:
      return Pass::template run<Element, AlphaKind::kOneAndHalf>(call, stream);
    case AlphaKind::kTwo:
      return Pass::template run<Element, AlphaKind::kTwo>(call, stream);
    case AlphaKind::kGeneral:
      return Pass::template run<Element, AlphaKind::kGeneral>(call, stream);
  }
}

template <typename Pass, typename Call>
void run(const Call& call, void* stream) {
  require(call.alpha_slices != nullptr || (call.alpha > 1.0 && call.alpha <= 2.0), "alpha must be in (1, 2]");
  if (call.outer == 0 || call.length == 0 || call.inner == 0) return;
  switch (call.dtype) {
    case DataType::kFloat32:
      return run_kind<Pass, float>(call, stream);
    case DataType::kBFloat16:
      return run_kind<Pass, __nv_bfloat16>(call, stream);
    case DataType::kFloat16:
      return run_kind<Pass, __half>(call, stream);
    case DataType::kFloat64:
      return run_kind<Pass, double>(call, stream);
    case DataType::kBool:
      throw std::invalid_argument("adasplash2: entmax of a bool tensor");
  }
}

}  // namespace

void entmax_forward(const EntmaxForward& call, void* stream) { run<ForwardPass>(call, stream); }

void entmax_backward(const EntmaxBackward& call, void* stream) { run<BackwardPass>(call, stream); }

}  // namespace adasplash2::cuda
