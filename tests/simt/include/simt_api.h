// What the shims of the toolkit's headers call in the emulator's runtime (tests/simt/src).
//
// No function takes a source position: the runtime reads it off the return address (report.h), so kernels and PTX
// wrappers need nothing written for the emulator's sake.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern uint3 threadIdx, blockIdx;  // of the running thread, set at every switch
extern dim3 blockDim, gridDim;

namespace simt {

// ---- inline PTX ----

// One operand of a PTX statement: an input's value or an output's address. 16 bytes, so that it travels in registers.
struct Operand {
  uint64_t bits;
  char constraint;  // 'r', 'l', 'f' or 'n', as in asm
  bool is_address;
};

inline Operand input(uint64_t value, char constraint) { return {value, constraint, false}; }
inline Operand input_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {bits, 'f', false};
}
template <typename T>
Operand output(T& variable, char constraint) {
  static_assert(std::is_trivially_copyable_v<T>);
  return {reinterpret_cast<uint64_t>(&variable), constraint, true};
}

// The text of one statement, with a place to keep what the interpreter parsed out of it.
struct PtxStatement {
  const char* text;
  const void* program = nullptr;
};
void execute_ptx(PtxStatement& statement, const Operand* operands, int num_operands, const void* site);

// Not instrumented, and not inlined: the operand list is the emulator's business, not the kernel's.
template <typename... Operands>
__attribute__((noinline, no_sanitize_thread)) void call_ptx(PtxStatement& statement, Operands... operands) {
  const Operand list[sizeof...(operands) + 1] = {operands..., Operand{}};
  execute_ptx(statement, list, static_cast<int>(sizeof...(operands)), __builtin_return_address(0));
}

// ---- warps ----

enum class Shuffle { kIndex, kXor, kDown, kUp };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int lane_operand, int width);
uint32_t ballot(uint32_t mask, bool predicate);
enum class Reduction { kAdd, kMax, kMin, kAnd, kOr, kXor };
int64_t reduce(Reduction operation, uint32_t mask, int64_t value);
void sync_warp(uint32_t mask);
uint32_t active_mask();

// ---- blocks ----

void sync_threads();
uint8_t* shared_memory();
uint32_t to_shared_address(const void* pointer);
[[noreturn]] void trap();

// ---- atomics: the word is replaced by update(word); returns the word before ----

enum class Atomic { kAdd, kMax, kMin, kAnd, kOr, kXor, kExchange };
uint32_t atomic_u32(Atomic operation, uint32_t* address, uint32_t operand);
int32_t atomic_s32(Atomic operation, int32_t* address, int32_t operand);
uint64_t atomic_u64(Atomic operation, uint64_t* address, uint64_t operand);
float atomic_f32(Atomic operation, float* address, float operand);
uint32_t atomic_compare_and_swap(uint32_t* address, uint32_t expected, uint32_t desired);

// ---- host ----

// Of the emulated device; simt_set_compute_capability() in src/c_api.cpp.
struct ComputeCapability {
  int major, minor;
};
ComputeCapability compute_capability();

// A kernel and its arguments; the function runs one thread.
struct KernelCall {
  void (*run_thread)(const void* arguments);
  const void* arguments;
  size_t argument_bytes;
};
// Runs the call once for each thread of the grid; throws std::runtime_error with the diagnosis.
void run_grid(dim3 grid, dim3 block, size_t smem_bytes, const KernelCall& call);

// Global memory of programs: bounds are checked, see register_global in src/shadow.h. Null when there is none.
void* allocate_global(size_t bytes);
void free_global(void* pointer);

void set_error(const std::string& text);

// The body of an extern "C" entry point: 0, or 1 with the text for simt_error().
template <typename Body>
int entry(Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    set_error(error.what());
    return 1;
  }
}

}  // namespace simt
