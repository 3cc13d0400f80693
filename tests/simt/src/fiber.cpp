#include "fiber.h"

#include <sys/mman.h>

#include <new>

#if !defined(__x86_64__)
#error "the context switch is written for x86-64"
#endif

asm(R"(
.text
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size simt_switch_stack, .-simt_switch_stack
)");

namespace simt {

namespace {
constexpr size_t kGuardBytes = 4096;
constexpr size_t kPitch = StackPool::kStackBytes + kGuardBytes;
}  // namespace

void StackPool::reserve(int num_stacks) {
  if (num_stacks <= num_stacks_) return;
  release();
  mapped_bytes_ = kPitch * static_cast<size_t>(num_stacks);
  void* mapping =
      mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<std::byte*>(mapping);
  num_stacks_ = num_stacks;
  for (int i = 0; i < num_stacks; ++i) mprotect(base_ + kPitch * static_cast<size_t>(i), kGuardBytes, PROT_NONE);
}

void StackPool::release() {
  if (base_ != nullptr) munmap(base_, mapped_bytes_);
  *this = {};
}

void* StackPool::prepare(int index, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  // The ABI wants (stack pointer + 8) % 16 == 0 at a function's first instruction: two words stay free above the entry.
  void** top = reinterpret_cast<void**>(base_ + kPitch * static_cast<size_t>(index + 1)) - 2;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  return top;
}

}  // namespace simt
