// Tensors for large results on the CPU, whose memory comes from the page cache (cpu/page_cache.h). A training step
// frees its output and gradients and asks for the same sizes again; in between the C library gives blocks of this size
// back to the system, and what it costs to get their pages anew can be a tenth of the step.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include "cpu/page_cache.h"

namespace adasplash2 {

class PageAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{cpu::take_pages(bytes).data, bytes};
    return {block->data, block, &give_back, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Null where blocks of whole pages are not for it: small tensors, other devices, and what would leave more than an
  // eighth of its pages unused.
  static PageAllocator* for_result(int64_t numel, const at::TensorOptions& options) {
    static auto* const allocator = new PageAllocator;  // never destroyed: tensors may be freed after static objects
    const size_t bytes = numel * options.dtype().itemsize();
    const bool is_fit = bytes >= cpu::kHugePage && cpu::mapped_bytes(bytes) - bytes <= bytes / 8;
    return is_fit && options.device().is_cpu() ? allocator : nullptr;
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  static void give_back(void* context) {
    auto* block = static_cast<Block*>(context);
    cpu::give_pages(block->data, block->bytes, block->bytes);
    delete block;
  }
};

constexpr c10::DispatchKeySet kCpuKeys(c10::DispatchKey::CPU);

inline at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  auto* allocator = PageAllocator::for_result(c10::multiply_integers(sizes), options);
  return allocator == nullptr ? at::empty(sizes, options)
                              : at::detail::empty_generic(sizes, allocator, kCpuKeys,
                                                          c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

// With the strides of `like`, which is dense.
inline at::Tensor empty_result_like(const at::Tensor& like) {
  auto* allocator = PageAllocator::for_result(like.numel(), like.options());
  return allocator == nullptr
             ? at::empty_like(like)
             : at::detail::empty_strided_generic(like.sizes(), like.strides(), allocator, kCpuKeys, like.scalar_type());
}

}  // namespace adasplash2
