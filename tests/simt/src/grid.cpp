// A launch: its blocks one after the other, and the faults that hit guard pages on the way.
#include <csignal>
#include <stdexcept>

#include "counters.h"
#include "fiber.h"
#include "scheduler.h"
#include "shadow.h"

namespace simt {

Counters counters;
extern StackPool stacks;

namespace {

void on_fault(int, siginfo_t* info, void* context) {
  if (current == nullptr) {  // not a kernel's doing: die of it as usual
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  // source_line looks one byte back, for return addresses.
  const auto pc = reinterpret_cast<const char*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
  if (stacks.contains(info->si_addr)) {
    fail("STACK OVERFLOW of a thread (%zu KB in the emulator) at %s", StackPool::kStackBytes / 1024,
         source_line(pc).c_str());
  }
  fail("SEGMENTATION FAULT at address %p, at %s", info->si_addr, source_line(pc).c_str());
}

// Faults are handled on a stack of their own, since a thread's may be what ran out; for the length of a launch only.
class FaultHandler {
 public:
  FaultHandler() {
    static char handler_stack[64 * 1024];
    const stack_t stack{handler_stack, 0, sizeof handler_stack};
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = &on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_action_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_{};
  struct sigaction old_action_{};
};

void check_launch(dim3 grid, dim3 block_size, size_t smem_bytes) {
  const uint64_t num_threads = uint64_t{block_size.x} * block_size.y * block_size.z;
  const bool is_grid_valid =
      grid.x >= 1 && grid.x < 1u << 31 && grid.y >= 1 && grid.y < 1 << 16 && grid.z >= 1 && grid.z < 1 << 16;
  if (!is_grid_valid || num_threads < 1 || num_threads > 1024 || block_size.z > 64 || smem_bytes > kMaxSharedBytes) {
    throw std::runtime_error("invalid launch: grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                             std::to_string(grid.z) + "), " + std::to_string(num_threads) + " threads, " +
                             std::to_string(smem_bytes) + " bytes of shared memory");
  }
  if (num_threads % kWarpSize != 0) throw std::runtime_error("the emulator runs whole warps: a multiple of 32 threads");
}

}  // namespace

void run_grid(dim3 grid, dim3 block_size, size_t smem_bytes, const KernelCall& call) {
  check_launch(grid, block_size, smem_bytes);
  const FaultHandler fault_handler;
  gridDim = grid;
  blockDim = block_size;
  set_argument_range(call.arguments, call.argument_bytes);
  const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < num_blocks; ++i) {
    const uint64_t index = options.seed == 1 ? num_blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    reset_shared(smem_bytes);
    run_block(block_size, index, call);
    if (!block.failure.empty()) throw std::runtime_error(block.failure);
    ++counters.blocks;
  }
}

void trap() { fail("__trap at %s", source_line(__builtin_return_address(0)).c_str()); }

}  // namespace simt
