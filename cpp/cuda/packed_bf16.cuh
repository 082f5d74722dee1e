// A thread's numbers of a packed slot (packed_bf16.h), from shared memory to the registers of a warpgroup product:
// three accesses of 16 bytes, and five instructions for two of them.
#pragma once

#include <cuda_bf16.h>

#include "cuda/mma.cuh"
#include "cuda/packed_bf16.h"

namespace gemma_cuda::cuda {

// Two numbers of two bytes of signs and mantissas, and of their exponents at bits 7 and 23 of `exponents`. A product
// with a power of two is exact.
template <uint32_t Bytes>
__device__ uint32_t unpack(uint32_t bytes, uint32_t exponents, uint32_t factor) {
  constexpr uint32_t kSignsAndMantissas = 0x807F807F, kExponents = 0x07800780;
  const uint32_t bits = (__byte_perm(bytes, 0, Bytes) & kSignsAndMantissas) | (exponents & kExponents);
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(bits), "r"(factor));
  return product;
}

// The four registers of columns 16 k and on, of rows whose factors are `low` and, eight below, `high`.
__device__ inline void unpack(uint32_t (&to)[4], uint32_t low_bytes, uint32_t high_bytes, uint32_t exponents,
                              uint32_t low, uint32_t high) {
  to[0] = unpack<0x1100>(low_bytes, exponents << 7, low);
  to[1] = unpack<0x1100>(high_bytes, exponents << 3, high);
  to[2] = unpack<0x3322>(low_bytes, exponents >> 1, low);
  to[3] = unpack<0x3322>(high_bytes, exponents >> 5, high);
}

// The exceptions of the thread's warp.
struct Exceptions {
  uint32_t list, at, end;

  __device__ explicit Exceptions(uint32_t slot) : list(slot + kPackedGroups * kPackedGroupBytes), at(0) {
    const uint32_t warp = threadIdx.x / 32;
    if (warp > 0) at = end_of(warp - 1);
    end = end_of(warp);
  }
  // One after the other: seldom more than one of a warp's 1024 numbers.
  __device__ void put(uint32_t (&to)[4][4]) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (; at < end; ++at) {
      uint32_t entry;
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(entry)
                   : "r"(list + uint32_t{sizeof(PackedExceptions::ends)} + 4 * at));
      const uint32_t mask = (entry >> 5 & 1) != 0 ? 0xFFFF0000 : 0xFFFF, number = __byte_perm(entry, 0, 0x3232) & mask,
                     which = (entry & 31) == lane ? entry >> 6 & 15 : ~0u;
#pragma unroll
      for (uint32_t r = 0; r < 16; ++r)
        if (r == which) to[r / 4][r % 4] = (to[r / 4][r % 4] & ~mask) | number;
    }
  }

 private:
  __device__ uint32_t end_of(uint32_t warp) const {
    uint32_t end;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(end) : "r"(list + warp));
    return end;
  }
};

// Of a slot at this address, a thread of a warpgroup: its elements of 64 rows and 64 columns.
__device__ inline void unpack_slot(uint32_t (&to)[4][4], uint32_t slot, const uint32_t (&factors)[2]) {
  const uint32_t own = slot + threadIdx.x / 128 * kPackedGroupBytes + threadIdx.x % 128 * 16;
  Exceptions exceptions(slot);
  const Words<16> first(own), second(own + 2048), exponents(own + 4096);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const auto& bytes = k < 2 ? first : second;
    unpack(to[k], bytes.word[k % 2 * 2], bytes.word[k % 2 * 2 + 1], exponents.word[k], factors[0], factors[1]);
  }
  exceptions.put(to);
}

}  // namespace gemma_cuda::cuda
