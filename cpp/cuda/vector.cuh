// Eight bf16 at a time: one 16-byte access.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace gemma_cuda::cuda {

using bf16_t = __nv_bfloat16;

struct alignas(16) Bf16x8 {
  __nv_bfloat162 pair[4];
};

__device__ inline void widen(const Bf16x8& from, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = __bfloat1622float2(from.pair[i]);
    to[2 * i] = both.x;
    to[2 * i + 1] = both.y;
  }
}

__device__ inline Bf16x8 narrow(const float (&from)[8]) {
  Bf16x8 to;
#pragma unroll
  for (int i = 0; i < 4; ++i) to.pair[i] = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
  return to;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The sum over a block of up to 1024 threads, to every thread. `partial` is 32 floats of shared memory; two calls in a
// row may share it.
__device__ inline float block_sum(float x, float* partial) {
  x = warp_sum(x);
  __syncthreads();  // the call before may still be reading
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = (blockDim.x + 31) / 32, lane = threadIdx.x % 32;
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

}  // namespace gemma_cuda::cuda
