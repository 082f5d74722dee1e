#include "cuda/copy_bandwidth.h"

#include <algorithm>
#include <string>

#include "cuda/check.h"
#include "cuda/memory.h"

namespace gemma_cuda::cuda {
namespace {

constexpr size_t kMost = size_t{1} << 30, kLeast = size_t{128} << 20;  // of one buffer; an L2 cache has 50 MB

// Two events around work on a stream.
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

// As large as a buffer can be, with room left for others.
size_t buffer_bytes() {
  size_t free = 0, total = 0;
  GEMMA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  const size_t bytes = std::min(kMost, free / 4);
  if (bytes < kLeast)
    throw Error::device("measuring the copy bandwidth takes " + std::to_string(4 * kLeast >> 20) +
                        " MiB of free GPU memory; " + std::to_string(free >> 20) +
                        " MiB are free. A smaller KV cache or batch leaves more");
  return bytes;
}

}  // namespace

double copy_bandwidth(cudaStream_t stream) {
  constexpr int kTurns = 5, kCopies = 4;
  const size_t bytes = buffer_bytes();
  DeviceScratch from, to;
  void* source = from.get<char>(bytes);
  void* target = to.get<char>(bytes);
  GEMMA_CUDA_CHECK(cudaMemsetAsync(source, 1, bytes, stream));
  Timer timer;
  double best = 0;
  for (int turn = 0; turn < kTurns; ++turn) {
    const double seconds = timer.seconds(stream, [&] {
      for (int i = 0; i < kCopies; ++i)
        GEMMA_CUDA_CHECK(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, stream));
    });
    best = std::max(best, 2.0 * static_cast<double>(bytes) * kCopies / seconds);
  }
  return best;
}

}  // namespace gemma_cuda::cuda
