// The functions that g++ -fsanitize=thread makes the kernels call at every load and store. The thread sanitizer itself
// is not linked; these hand the accesses to the shadow memory.
#include "shadow.h"

#define SIMT_SITE __builtin_return_address(0)
#define SIMT_ACCESS(name, bytes, access) \
  extern "C" void name(void* address) { simt::check_access(address, bytes, simt::Access::access, SIMT_SITE); }
#define SIMT_ACCESSES(bytes)                                \
  SIMT_ACCESS(__tsan_read##bytes, bytes, kRead)             \
  SIMT_ACCESS(__tsan_write##bytes, bytes, kWrite)           \
  SIMT_ACCESS(__tsan_unaligned_read##bytes, bytes, kRead)   \
  SIMT_ACCESS(__tsan_unaligned_write##bytes, bytes, kWrite) \
  SIMT_ACCESS(__tsan_volatile_read##bytes, bytes, kRead)    \
  SIMT_ACCESS(__tsan_volatile_write##bytes, bytes, kWrite)

SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)

extern "C" {

void __tsan_read_range(void* address, unsigned long bytes) {
  simt::check_access(address, bytes, simt::Access::kRead, SIMT_SITE);
}
void __tsan_write_range(void* address, unsigned long bytes) {
  simt::check_access(address, bytes, simt::Access::kWrite, SIMT_SITE);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"
