// Dynamic scheduling of independent tasks, and scratch memory for them.
#pragma once

#include "cpu/standard_headers.h"

namespace adasplash2::cpu {

// make_worker() runs once per thread and returns a callable worker(task); tasks are handed out in order.
template <class MakeWorker>
void run_tasks(const Parallel& parallel, int64_t num_tasks, MakeWorker make_worker) {
  if (num_tasks <= 0) return;
  const int num_threads = static_cast<int>(std::min<int64_t>(parallel.num_threads, num_tasks));
  std::atomic<int64_t> next{0};
  const std::function<void(int)> body = [&](int) {
    auto worker = make_worker();
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) worker(task);
  };
  if (num_threads == 1) body(0);
  else parallel.run(num_threads, body);
}

// Of a buffer that is large: is all of it used? Then it asks for huge pages; buffers live for one call, and page faults
// would take as long as what is done with them.
enum class Use { kWhole, kSparse };

// Uninitialised, cache-line aligned memory that only grows.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { reserve(size); }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  T* reserve(int64_t size, Use use = Use::kWhole) {  // contents are lost when it grows
    if (size > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      constexpr size_t kHugePage = size_t{2} << 20;
      const bool is_large = size * sizeof(T) >= 2 * kHugePage && use == Use::kWhole;
      const size_t alignment = is_large ? kHugePage : 64;
      const size_t bytes = (size * sizeof(T) + alignment - 1) / alignment * alignment;
      data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      if (is_large) madvise(data_, bytes, MADV_HUGEPAGE);
      size_ = size;
    }
    return data_;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace adasplash2::cpu
