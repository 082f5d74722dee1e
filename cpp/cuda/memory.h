// Device and pinned host memory with owners.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <utility>

#include "cuda/check.h"

namespace gemma_cuda::cuda {

// Throws Error::device with the numbers.
inline void* allocate_device(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, std::max<size_t>(bytes, 1));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // this failure is over; later calls must not see it
    size_t free = 0, total = 0;
    GEMMA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    throw Error::device("could not allocate " + std::to_string(bytes) + " bytes on the GPU: " + std::to_string(free) +
                        " of its " + std::to_string(total) + " are free");
  }
  check(status, "cudaMalloc");
  return memory;
}

inline void* allocate_pinned(size_t bytes) {
  void* memory = nullptr;
  GEMMA_CUDA_CHECK(cudaMallocHost(&memory, bytes));
  return memory;
}

// Memory that grows to what was asked for at most; its content does not survive growth.
template <void* (*Allocate)(size_t), cudaError_t (*Free)(void*)>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { Free(data_); }

  // The caller has waited for work that uses the old memory, or it is ordered by cudaFree, which waits.
  template <class T>
  T* get(size_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > bytes_) {
      Free(std::exchange(data_, nullptr));
      bytes_ = 0;
      data_ = Allocate(bytes);
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

using DeviceScratch = Scratch<allocate_device, cudaFree>;
using PinnedScratch = Scratch<allocate_pinned, cudaFreeHost>;

}  // namespace gemma_cuda::cuda
