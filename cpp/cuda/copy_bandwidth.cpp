#include "cuda/copy_bandwidth.h"

#include <algorithm>
#include <string>

#include "cuda/check.h"
#include "cuda/memory.h"
#include "cuda/timer.h"

namespace gemma_cuda::cuda {
namespace {

constexpr size_t kMost = size_t{1} << 30, kLeast = size_t{128} << 20;  // of one buffer; an L2 cache has 50 MB

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
