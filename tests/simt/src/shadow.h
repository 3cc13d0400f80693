// Shadow memory: who last wrote each byte of shared memory and who read it since, so that every access can be checked
// against the vector clocks; and the ranges of global memory that a launch may touch.
#pragma once

#include <simt_api.h>

#include "scheduler.h"

namespace simt {

constexpr size_t kMaxSharedBytes = 227 * 1024;
// Where the shared window starts: as on the device, the system owns the first KB, so that offset 0 is never valid.
constexpr uint32_t kSharedWindow = 1024;

// ---- shared memory ----

void reset_shared(size_t bytes);
// The host address behind `bytes` of the shared window; out of bounds is a failure.
uint8_t* shared_pointer(uint32_t address, uint32_t bytes, Site site);
bool is_shared(const void* pointer);

// Accesses by ordinary loads and stores of a thread (generic proxy), checked and recorded.
void record_read(const Thread& thread, uint32_t address, uint32_t bytes, Site site);
void record_write(const Thread& thread, uint32_t address, uint32_t bytes, Site site);
void record_atomic(const Thread& thread, uint32_t address, uint32_t bytes, Site site);

// Asynchronous writes. From begin to end nobody may touch the bytes. A copy by the async proxy (TMA) needs a proxy
// fence after ordinary writes. `end` makes `actor`, at `epoch`, the writer.
enum class Proxy : uint8_t { kGeneric, kAsync };
void begin_async_write(const Thread& issuer, uint32_t address, uint32_t bytes, Site site, Proxy proxy);
void end_async_write(uint32_t address, uint32_t bytes, int actor, Epoch epoch, Site site, Proxy proxy);

// Reads by the async proxy (TMA stores, wgmma operands). From begin to end nobody may write the bytes. `end` makes
// `actor`, at `epoch`, a reader.
void begin_async_read(const Thread& issuer, uint32_t address, uint32_t bytes, Site site);
void end_async_read(uint32_t address, uint32_t bytes, int actor, Epoch epoch, Site site);

// ---- global memory ----

// While any range is registered, accesses outside all of them (and outside what belongs to the host code) are failures.
void register_global(const void* address, size_t bytes, const char* name);
void unregister_globals();
// Host memory that a kernel reads without asking: the argument list of the launch.
void set_argument_range(const void* address, size_t bytes);
void check_global(const void* address, size_t bytes, const char* access, Site site);

// ---- ordinary accesses, as the instrumented kernel reports them ----

enum class Access { kRead, kWrite, kAtomic };
void check_access(const void* address, size_t bytes, Access access, Site site);

}  // namespace simt
