#include "report.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace simt {

namespace {

// The frames at an address, innermost (inlined) first.
std::vector<std::string> frames_at(Site site) {
  Dl_info image;
  if (site == nullptr || dladdr(site, &image) == 0) return {};
  char command[1024];
  // The return address belongs to the next instruction; one byte earlier is inside the call.
  const auto offset = static_cast<const char*>(site) - static_cast<const char*>(image.dli_fbase) - 1;
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx", image.dli_fname, static_cast<size_t>(offset));
  std::vector<std::string> frames;
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return {};
  char line[1024];
  while (fgets(line, sizeof line, pipe) != nullptr) {
    line[strcspn(line, "\n (")] = '\0';  // addr2line appends " (discriminator n)"
    frames.emplace_back(line);
  }
  pclose(pipe);
  return frames;
}

bool is_wrapper(const std::string& frame) {
  return frame.find("/cuda/ptx/") != std::string::npos || frame.find("/simt/include/") != std::string::npos ||
         frame.find("/c++/") != std::string::npos;
}

std::string last_two_components(const std::string& path) {
  size_t slash = path.rfind('/');
  if (slash == std::string::npos || slash == 0) return path;
  slash = path.rfind('/', slash - 1);
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

}  // namespace

std::string source_line(Site site) {
  static std::unordered_map<Site, std::string> cache;
  auto [entry, is_new] = cache.try_emplace(site, "?");
  if (!is_new) return entry->second;
  int shown = 0;
  const std::vector<std::string> frames = frames_at(site);
  const bool is_kernel_known = !std::all_of(frames.begin(), frames.end(), is_wrapper);
  for (const std::string& frame : frames) {
    if (frame.rfind("??", 0) == 0 || (is_kernel_known && is_wrapper(frame))) continue;
    if (shown == 0) entry->second = last_two_components(frame);
    if (shown == 1) entry->second += " (called at " + last_two_components(frame);
    if (shown >= 2) entry->second += ", at " + last_two_components(frame);
    ++shown;
  }
  if (shown >= 2) entry->second += ")";
  return entry->second;
}

void fail(const char* format, ...) {
  char text[8192];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!block.is_running) throw std::runtime_error(text);
  char where[160] = "";
  if (current != nullptr) {
    snprintf(where, sizeof where, "block (%u, %u, %u) thread (%u, %u, %u) warp %d lane %d: ", blockIdx.x, blockIdx.y,
             blockIdx.z, current->id.x, current->id.y, current->id.z, current->warp, current->lane);
  } else {
    snprintf(where, sizeof where, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  }
  abandon_block(std::string(where) + text);
}

}  // namespace simt
