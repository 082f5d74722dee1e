// Gathers magnitudes for calibration (ObserveArgs): the largest, and counts in the bins of ops/backend.h.
//
// A block counts a share of the rows of one group in shared memory and adds what it found to the totals at its end.
// Integer sums and maxima do not depend on the order, so neither does what calibration makes of them.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/vector.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kMostBlocks = 1024;  // for all groups together

struct Counter {
  uint32_t bins[kMagnitudeBins];
  uint32_t largest;  // as bits, which order magnitudes

  __device__ void clear() {
    for (uint32_t i = threadIdx.x; i < kMagnitudeBins; i += kThreads) bins[i] = 0;
    if (threadIdx.x == 0) largest = 0;
    __syncthreads();
  }
  __device__ void add(bf16_t x) {
    const uint32_t bits = __float_as_uint(__bfloat162float(x)) & 0x7FFFFFFF;
    atomicAdd(&bins[magnitude_bin(bits)], 1);
    if (bits < 0x7F800000 && bits > largest) atomicMax(&largest, bits);
  }
  __device__ void flush(const Magnitudes& to, uint32_t group) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kMagnitudeBins; i += kThreads)
      if (bins[i] != 0)
        atomicAdd(reinterpret_cast<unsigned long long*>(to.counts) + size_t{group} * kMagnitudeBins + i, bins[i]);
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned int*>(to.largest) + group, largest);
  }
};

__global__ void __launch_bounds__(kThreads)
    observe_kernel(const bf16_t* x, uint32_t rows, uint32_t width, uint32_t columns, Magnitudes to) {
  __shared__ Counter counter;
  allow_next();
  wait_for_last();
  counter.clear();
  for (uint32_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (uint32_t i = threadIdx.x; i < columns; i += kThreads)
      counter.add(x[size_t{row} * width + blockIdx.y * columns + i]);
  counter.flush(to, blockIdx.y);
}

__global__ void __launch_bounds__(kThreads)
    observe_cache_kernel(const bf16_t* cache, KvLayer layer, const uint32_t* slots, uint32_t tokens, Magnitudes to) {
  __shared__ Counter counter;
  allow_next();
  wait_for_last();
  counter.clear();
  for (uint32_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const uint32_t slot = slots[token];
    if (slot == kNoSlot) continue;
    const size_t row = (size_t{slot / layer.page_size} * layer.kv_heads + blockIdx.y) * layer.page_size;
    for (uint32_t i = threadIdx.x; i < layer.head_dim; i += kThreads)
      counter.add(cache[(row + slot % layer.page_size) * layer.head_dim + i]);
  }
  counter.flush(to, blockIdx.y);
}

dim3 grid(uint32_t rows, uint32_t groups) {
  return dim3(std::clamp(kMostBlocks / groups, 1u, std::max(rows, 1u)), groups);
}

}  // namespace

void observe(const ObserveArgs& args, const Stream& stream) {
  launch_early(stream, grid(args.rows, args.groups), kThreads, 0, observe_kernel, static_cast<const bf16_t*>(args.x),
               args.rows, args.width, args.width / args.groups, args.to);
}

void observe_cache(const ObserveCacheArgs& args, const Stream& stream) {
  const dim3 blocks = grid(args.tokens, args.cache.kv_heads);
  launch_early(stream, blocks, kThreads, 0, observe_cache_kernel, static_cast<const bf16_t*>(args.cache.keys),
               args.cache, args.slots, args.tokens, args.keys);
  launch_early(stream, blocks, kThreads, 0, observe_cache_kernel, static_cast<const bf16_t*>(args.cache.values),
               args.cache, args.slots, args.tokens, args.values);
}

}  // namespace gemma_cuda::cuda
