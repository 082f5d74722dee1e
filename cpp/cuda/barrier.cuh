// Barriers in shared memory (mbarrier): some threads arrive, others wait for a phase, told by its parity, to be over.
#pragma once

#include <cstdint>

#include "cuda/mma.cuh"

namespace gemma_cuda::cuda {

using Barrier = uint64_t;

__device__ inline void init(Barrier& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
__device__ inline void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and makes the phase also wait for so many bytes that tensor copies (tensor_map.cuh) bring.
__device__ inline void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// Makes the initial state visible to tensor copies.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives when all copies that this thread has started (copy_async) are done.
__device__ inline void arrive_after_copies(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
__device__ inline void wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Whether the phase is over, without waiting.
__device__ inline bool is_over(Barrier& barrier, uint32_t parity) {
  uint32_t over;
  asm volatile("{.reg .pred over; mbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2; selp.b32 %0, 1, 0, over;}"
               : "=r"(over)
               : "r"(shared_address(&barrier)), "r"(parity)
               : "memory");
  return over;
}

}  // namespace gemma_cuda::cuda
