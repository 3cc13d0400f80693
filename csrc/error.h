// The kernel layer reports what it cannot do by throwing; it never exits and never prints.
#pragma once

#include <stdexcept>
#include <string>

namespace adasplash2 {

// An option that is not built (becomes NotImplementedError in Python).
struct NotBuilt : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("adasplash2: " + message);
}

}  // namespace adasplash2
