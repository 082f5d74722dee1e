// Threads that stay, for loops over independent pieces of one operation.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gemma_cuda {

class ThreadPool {
 public:
  explicit ThreadPool(uint32_t threads);  // the caller is one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  uint32_t threads() const { return static_cast<uint32_t>(workers_.size()) + 1; }

  // Calls body(i) for every i below count, in any order, and returns when all are done. The body must not throw.
  void run(uint32_t count, const std::function<void(uint32_t)>& body);

 private:
  void work();
  void drain();

  std::vector<std::thread> workers_;
  const std::function<void(uint32_t)>* body_ = nullptr;
  uint32_t count_ = 0;
  std::atomic<uint32_t> next_{0};     // the next piece to take
  std::atomic<uint32_t> working_{0};  // workers that have not finished this loop
  std::atomic<uint32_t> loop_{0};     // counts loops; workers wait for it to change
  std::atomic<bool> stop_{false};
};

}  // namespace gemma_cuda
