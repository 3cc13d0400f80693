// Diagnoses: the text of a failure, with the source lines of the kernel.
#pragma once

#include <string>

namespace simt {

// A return address into the kernel's code. Debug information turns it into a line when a report needs one.
using Site = const void*;

// "folder/file.cuh:line", or "?". A line in a PTX wrapper or shim is replaced by the line that called it; where the
// line belongs to a function that was inlined elsewhere, that place follows: "tile/load.cuh:12 (called at
// sm80/scan.cuh:80)".
std::string source_line(Site site);

// Ends the launch: run_grid throws the text, preceded by the running thread's coordinates.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
