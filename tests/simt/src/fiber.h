// Stacks and the switch between them: every CUDA thread is a fiber of one host thread.
#pragma once

#include <cstddef>

namespace simt {

// Saves the callee-saved registers and the stack pointer to *save, and continues where `load` was saved.
extern "C" void simt_switch_stack(void** save, void* load);

// Stacks with a guard page below each; kept from launch to launch, since mapping them costs more than a small block.
class StackPool {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;

  void reserve(int num_stacks);
  void release();
  // A stack pointer from which simt_switch_stack enters `entry`, which must not return.
  void* prepare(int index, void (*entry)());
  bool contains(const void* address) const {
    return static_cast<size_t>(static_cast<const std::byte*>(address) - base_) < mapped_bytes_;
  }

 private:
  std::byte* base_ = nullptr;
  size_t mapped_bytes_ = 0;
  int num_stacks_ = 0;
};

}  // namespace simt
