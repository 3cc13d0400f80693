// Atomic read-modify-writes on shared and global memory. Only one thread runs at a time, so a plain update is atomic;
// what is checked is that ordinary accesses to the same bytes are ordered.
#include <algorithm>

#include "counters.h"
#include "shadow.h"

namespace simt {

namespace {

template <typename T, typename Update>
T update_atomically(T* address, Site site, Update update) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    fail("atomic at %s: the address is not a multiple of %zu", source_line(site).c_str(), sizeof(T));
  }
  ++(is_shared(address) ? counters.shared_atomics : counters.global_atomics);
  check_access(address, sizeof(T), Access::kAtomic, site);
  const T before = *address;
  *address = update(before);
  return before;
}

template <typename T>
T apply(Atomic operation, T before, T operand) {
  switch (operation) {
    case Atomic::kAdd:
      return before + operand;
    case Atomic::kMax:
      return std::max(before, operand);
    case Atomic::kMin:
      return std::min(before, operand);
    case Atomic::kExchange:
      return operand;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (operation == Atomic::kAnd) return before & operand;
    if (operation == Atomic::kOr) return before | operand;
    if (operation == Atomic::kXor) return before ^ operand;
  }
  __builtin_unreachable();
}

}  // namespace

#define SIMT_ATOMIC(name, T)                                                               \
  T name(Atomic operation, T* address, T operand) {                                        \
    return update_atomically(address, __builtin_return_address(0),                         \
                             [&](T before) { return apply(operation, before, operand); }); \
  }
SIMT_ATOMIC(atomic_u32, uint32_t)
SIMT_ATOMIC(atomic_s32, int32_t)
SIMT_ATOMIC(atomic_u64, uint64_t)
SIMT_ATOMIC(atomic_f32, float)

uint32_t atomic_compare_and_swap(uint32_t* address, uint32_t expected, uint32_t desired) {
  return update_atomically(address, __builtin_return_address(0),
                           [&](uint32_t before) { return before == expected ? desired : before; });
}

}  // namespace simt
