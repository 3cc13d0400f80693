// A test is a function of checks; a failed check prints what it saw and the program then ends with 1.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>

namespace adasplash2::test {

inline int num_failures = 0;

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  ++num_failures;
  std::ostringstream text;
  text.precision(9);
  (text << ... << parts);
  std::fprintf(stderr, "FAILED: %s\n", text.str().c_str());
}

inline int result() {
  if (num_failures > 0) std::fprintf(stderr, "%d checks failed\n", num_failures);
  return num_failures > 0 ? 1 : 0;
}

}  // namespace adasplash2::test
