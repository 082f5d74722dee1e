// How long work on a stream takes, measured on the device.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.h"

namespace gemma_cuda::cuda {

class Timer {
 public:
  Timer() {
    GEMMA_CUDA_CHECK(cudaEventCreate(&begin_));
    const cudaError_t status = cudaEventCreate(&end_);
    if (status != cudaSuccess) cudaEventDestroy(begin_);
    check(status, "cudaEventCreate");
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  // Of what `work` puts on the stream; waits for it.
  template <class F>
  double seconds(cudaStream_t stream, F work) {
    GEMMA_CUDA_CHECK(cudaEventRecord(begin_, stream));
    work();
    GEMMA_CUDA_CHECK(cudaEventRecord(end_, stream));
    GEMMA_CUDA_CHECK(cudaEventSynchronize(end_));
    float milliseconds = 0;
    GEMMA_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return milliseconds / 1e3;
  }

 private:
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace gemma_cuda::cuda
