// Copies between the device's memory and the host's pinned memory, which the device reads and writes over the bus.
//
// What is small, as a step's tables and its results, is copied by a kernel: the copy engine and the next kernel wait
// for each other some us, in which the GPU would do nothing between two steps.
#include <algorithm>

#include "cuda/check.h"
#include "cuda/ops.h"
#include "cuda/tensor_map.h"

namespace gemma_cuda::cuda {
namespace {

constexpr size_t kSmallBytes = size_t{256} << 10;
constexpr uint32_t kThreads = 256, kBlocks = 64;

__global__ void copy_kernel(uint4* to, const uint4* from, uint32_t vectors, uint32_t words) {
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  for (uint32_t i = first; i < vectors; i += gridDim.x * blockDim.x) to[i] = from[i];
  if (first < words)  // behind the last vector
    reinterpret_cast<uint32_t*>(to + vectors)[first] = reinterpret_cast<const uint32_t*>(from + vectors)[first];
}

}  // namespace

void copy_pinned(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes > kSmallBytes || bytes % sizeof(uint32_t) != 0 || !aligned(to) || !aligned(from)) {
    GEMMA_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
    return;
  }
  const uint32_t vectors = static_cast<uint32_t>(bytes / sizeof(uint4)),
                 words = static_cast<uint32_t>(bytes % sizeof(uint4) / sizeof(uint32_t));
  copy_kernel<<<std::clamp((vectors + kThreads - 1) / kThreads, 1u, kBlocks), kThreads, 0, stream>>>(
      static_cast<uint4*>(to), static_cast<const uint4*>(from), vectors, words);
  GEMMA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace gemma_cuda::cuda
