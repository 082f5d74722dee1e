// A second stream for what may run beside the first one's work, captured with it or not.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/ops.h"

namespace gemma_cuda::cuda {

// Of the device that is current when it is opened and closed.
class SideStream {
 public:
  void open() {
    GEMMA_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (cudaEvent_t* event : {&forked_, &joined_})
      GEMMA_CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  }
  void close() noexcept {
    if (forked_ != nullptr) cudaEventDestroy(forked_);
    if (joined_ != nullptr) cudaEventDestroy(joined_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  // What is launched there waits for all that `main` has been given so far.
  Stream fork(cudaStream_t main) {
    GEMMA_CUDA_CHECK(cudaEventRecord(forked_, main));
    GEMMA_CUDA_CHECK(cudaStreamWaitEvent(stream_, forked_));
    return {stream_, false};
  }
  // What `main` is given from now on waits for it.
  void join(cudaStream_t main) {
    GEMMA_CUDA_CHECK(cudaEventRecord(joined_, stream_));
    GEMMA_CUDA_CHECK(cudaStreamWaitEvent(main, joined_));
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t forked_ = nullptr, joined_ = nullptr;
};

}  // namespace gemma_cuda::cuda
