// How long what is read or written stays in the L2 cache. A step reads far more than it holds: weights, keys and
// values, each once, which are the first to leave. What kernels write for each other is the last: if it left, it would
// have to be written to memory, for nobody. 1 % of a step of 64 sequences in FP8.
#pragma once

#include <cstdint>

namespace gemma_cuda::cuda {

// As createpolicy makes them of all of an access.
constexpr uint64_t kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000;

// Copies 16 bytes to shared memory (mma.cuh), or zeroes them where there is nothing to copy; read once.
__device__ inline void stream_async(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0), "l"(kEvictFirst)
               : "memory");
}

// Stores what another kernel, or block, is about to read.
__device__ inline void store_kept(float* to, float x) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(x), "l"(kEvictLast) : "memory");
}
__device__ inline void store_kept(float4* to, float4 x) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w), "l"(kEvictLast)
               : "memory");
}

}  // namespace gemma_cuda::cuda
