// Chooses the instruction set and hands over to its kernels.
#include <atomic>

#include "cpu/isa.h"
#include "cpu/support_layout.h"
#include "error.h"

namespace adasplash2::cpu {
namespace {

struct IsaLevel {
  const KernelTable& kernels;
  bool is_supported;
};

const std::vector<IsaLevel>& levels() {  // slowest first
  static const std::vector<IsaLevel> levels = [] {
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return std::vector<IsaLevel>{
        {baseline::kKernels, true}, {avx2::kKernels, has_avx2}, {avx512::kKernels, has_avx512}};
  }();
  return levels;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> kernels = [] {
    const KernelTable* best = nullptr;
    for (const IsaLevel& level : levels()) {
      if (level.is_supported) best = &level.kernels;
    }
    return best;
  }();
  return kernels;
}

void check(const AttentionProblem& problem) {
  require(problem.head_dim % kHeadDimMultiple == 0 && problem.value_head_dim % kHeadDimMultiple == 0,
          "head dimensions must be multiples of 16 in the CPU kernels");
  require(problem.num_keys < (int64_t{1} << 31) - 128 && problem.num_queries < (int64_t{1} << 31) - 128,
          "at most 2^31 - 128 queries and keys, columns are 32-bit numbers");
}

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const IsaLevel& level : levels()) {
    if (level.is_supported) names.emplace_back(level.kernels.isa);
  }
  return names;
}

std::string isa() { return chosen().load()->isa; }

void set_isa(const std::string& name) {
  for (const IsaLevel& level : levels()) {
    if (level.is_supported && name == level.kernels.isa) {
      chosen() = &level.kernels;
      return;
    }
  }
  std::string names;
  for (const std::string& level : isa_levels()) names += " " + level;
  throw std::invalid_argument("adasplash2: expected one of the instruction sets" + names + ", got " + name);
}

int64_t support_bytes(const AttentionProblem& problem) { return SupportLayout(problem).bytes(); }

void attention_forward(const AttentionForward& params, const Parallel& parallel) {
  check(params);
  chosen().load()->attention_forward(params, parallel);
}

void attention_backward(const AttentionBackward& params, const Parallel& parallel) {
  check(params);
  chosen().load()->attention_backward(params, parallel);
}

void entmax_forward(const EntmaxForward& params, const Parallel& parallel) {
  if (params.outer * params.length * params.inner == 0) return;
  chosen().load()->entmax_forward(params, parallel);
}

void entmax_backward(const EntmaxBackward& params, const Parallel& parallel) {
  if (params.outer * params.length * params.inner == 0) return;
  chosen().load()->entmax_backward(params, parallel);
}

}  // namespace adasplash2::cpu
