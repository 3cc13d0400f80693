// Dynamic scheduling of independent tasks, and scratch memory for them.
#pragma once

#include "cpu/standard_headers.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

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

// Of a buffer of 1 MB and more: is all of it used? Then it comes from the page cache, in huge pages. (What the C
// library hands out again depends on what was freed before: its thresholds follow the largest block.)
enum class Use { kWhole, kSparse };

// Uninitialised, cache-line aligned memory that only grows.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { reserve(size); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { free(); }

  T* reserve(int64_t size, Use use = Use::kWhole) {  // contents are lost when it grows
    if (size > size_) {
      free();
      const size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
      const bool is_large = bytes >= kHugePage / 2 && use == Use::kWhole;
      data_ = static_cast<T*>(is_large ? take_pages(bytes).data : std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = size;
      is_large_ = is_large;
    }
    return data_;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(is_large_, other.is_large_);
  }
  void free() {
    if (is_large_) give_pages(data_, size_ * sizeof(T), size_ * sizeof(T));
    else std::free(data_);
    data_ = nullptr;
    size_ = 0;
    is_large_ = false;
  }

  T* data_ = nullptr;
  int64_t size_ = 0;
  bool is_large_ = false;
};

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
