// Eight elements at a time: one 16-byte access of bf16, one of 8 bytes of FP8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

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

__device__ inline void load8(const bf16_t* from, float (&to)[8]) { widen(*reinterpret_cast<const Bf16x8*>(from), to); }
__device__ inline void load8(const float* from, float (&to)[8]) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

__device__ inline Bf16x8 narrow(const float (&from)[8]) {
  Bf16x8 to;
#pragma unroll
  for (int i = 0; i < 4; ++i) to.pair[i] = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
  return to;
}

// Two elements to E4M3, to nearest even, saturating, the first in the low byte. As to_e4m3 in ops/convert.h, bit for
// bit.
__device__ inline uint32_t narrow_e4m3(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

__device__ inline uint2 narrow_e4m3(const float (&from)[8], float factor) {
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = narrow_e4m3(from[2 * i] * factor, from[2 * i + 1] * factor);
  return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

__device__ inline float largest_magnitude(const float (&x)[8]) {
  float largest = 0;
#pragma unroll
  for (float value : x) largest = fmaxf(largest, fabsf(value));
  return largest;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

// The sum over a block of up to 1024 threads, to every thread; of block_max the largest, where none is negative.
// `partial` is 32 floats of shared memory; calls in a row may share it.
__device__ inline float block_sum(float x, float* partial) {
  x = warp_sum(x);
  __syncthreads();  // the call before may still be reading
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = (blockDim.x + 31) / 32, lane = threadIdx.x % 32;
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}
__device__ inline float block_max(float x, float* partial) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = (blockDim.x + 31) / 32, lane = threadIdx.x % 32;
  return warp_max(lane < warps ? partial[lane] : 0.0f);
}

}  // namespace gemma_cuda::cuda
