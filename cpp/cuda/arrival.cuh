// How whoever comes last of some blocks or warps finds that out.
#pragma once

#include <cstdint>

namespace gemma_cuda::cuda {

__device__ inline uint32_t load_acquire(const uint32_t& from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(&from) : "memory");
  return value;
}

// What the caller, and whoever it met at a barrier before, has written is there for those that add later.
__device__ inline uint32_t add_acquire_release(uint32_t& to) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(&to) : "memory");
  return before;
}

}  // namespace gemma_cuda::cuda
