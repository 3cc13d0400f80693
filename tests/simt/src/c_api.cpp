// What tests/simt/emulator.py calls through ctypes.
#include "counters.h"
#include "fiber.h"
#include "scheduler.h"
#include "shadow.h"

namespace simt {

extern StackPool stacks;

namespace {
std::string last_error;
ComputeCapability device{9, 0};

#define SIMT_NAME(name) #name,
const char* const kCounterNames[] = {SIMT_COUNTERS(SIMT_NAME)};
#undef SIMT_NAME
}  // namespace

void set_error(const std::string& text) { last_error = text; }
ComputeCapability compute_capability() { return device; }

}  // namespace simt

#pragma GCC visibility push(default)
extern "C" {

const char* simt_error() { return simt::last_error.c_str(); }

void simt_set_compute_capability(int major, int minor) { simt::device = {major, minor}; }

void simt_configure(uint64_t seed, int check_races) { simt::options = {seed, check_races != 0}; }

void simt_register_global(const void* address, size_t bytes, const char* name) {
  simt::register_global(address, bytes, name);
}
void simt_unregister_globals() { simt::unregister_globals(); }
void simt_release_stacks() { simt::stacks.release(); }

int simt_num_counters() { return static_cast<int>(sizeof simt::Counters() / sizeof(uint64_t)); }
const char* simt_counter_name(int index) { return simt::kCounterNames[index]; }
uint64_t simt_counter(int index) { return reinterpret_cast<const uint64_t*>(&simt::counters)[index]; }
void simt_reset_counters() { simt::counters = {}; }

}  // extern "C"
#pragma GCC visibility pop
