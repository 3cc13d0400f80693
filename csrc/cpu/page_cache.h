// Memory for what is large: scratch that lives for a call, the support between a forward pass and its backward pass,
// results (page_allocator.h).
//
// The system hands out such memory page by page, cleared, and takes it back when it is freed, so that every step pays
// for its pages again: as much as for a third of its arithmetic. Blocks that are given back are therefore kept for the
// next ones. Their pages are marked as free (MADV_FREE): the system takes them when it is short of memory, and only
// then.
#pragma once

#include <cstddef>

namespace adasplash2::cpu {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostKeptBytes = size_t{256} << 20;  // of all blocks that nobody uses

struct Pages {
  void* data;
  size_t used;  // bytes from the front that may hold anything; all others are zero
};

// What a block for so many bytes is mapped as: one of eight sizes between a power of two and the next, so that blocks
// fit again where sizes depend on the data. What is not touched costs nothing.
size_t mapped_bytes(size_t bytes);

// At least so many bytes, aligned to kHugePage and committed as they are touched. Throws std::bad_alloc.
Pages take_pages(size_t bytes);

// data, bytes: of take_pages(). used: bytes from the front that may have been written to; the rest goes back at once.
void give_pages(void* data, size_t bytes, size_t used) noexcept;

size_t kept_bytes();  // of blocks that nobody uses

}  // namespace adasplash2::cpu
