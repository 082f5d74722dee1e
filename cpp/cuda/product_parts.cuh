// Who has which part of a product, and their sum (product_parts.h).
#pragma once

#include "cuda/product_parts.h"
#include "cuda/vector.cuh"

namespace gemma_cuda::cuda {

__device__ inline uint32_t operator/(uint32_t n, const Divisor& by) { return __umulhi(2 * n, by.factor); }

__device__ inline uint32_t first_slot(const Cut& cut, uint32_t block) {
  return block * cut.run + min(block, cut.longer);
}
__device__ inline uint32_t block_of(const Cut& cut, uint32_t slot) {
  const uint32_t of_longer = cut.longer * (cut.run + 1);
  return slot < of_longer ? slot / cut.by_longer_run : cut.longer + (slot - of_longer) / cut.by_run;
}

// The blocks that have a part of a tile.
struct Blocks {
  uint32_t first = 0, last = 0;

  Blocks() = default;
  __device__ Blocks(const Cut& cut, uint32_t tile)
      : first(block_of(cut, tile * cut.depth)), last(block_of(cut, (tile + 1) * cut.depth - 1)) {}
  // Where one of them leaves it.
  __device__ uint32_t place(uint32_t block) const { return block * 2 + (block == first); }
};

// What eight neighbours of a row of the product are multiplied by. The model's scales are asked for at once, before the
// kernel before has ended: they come from memory, for a step reads more than the L2 cache holds before it needs them
// again. What other kernels have just written is not.
struct PartScales {
  float w[8] = {}, x = 1;

  PartScales() = default;
  __device__ PartScales(const ProductParts& parts, uint32_t column) {
    if (parts.w_scales == nullptr) return;
    if (!parts.fresh) load8(parts.w_scales + column, w);
    if (parts.one_x_scale) x = *parts.x_scales;
  }
  __device__ void apply(const ProductParts& parts, uint32_t token, uint32_t column, float (&to)[8]) const {
    if (parts.w_scales == nullptr) return;
    float late[8];
    if (parts.fresh) load8(parts.w_scales + column, late);
    const float of_x = parts.one_x_scale ? x : parts.x_scales[token];
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] *= (parts.fresh ? late[j] : w[j]) * of_x;
  }
};

// Eight neighbours of a row of the product: the parts that these blocks have, added in the order of k, with their
// scales, and rounded to bf16 as a product's output is.
__device__ inline void add_parts(const ProductParts& parts, uint32_t token, uint32_t column, const Blocks& blocks,
                                 const PartScales& scales, float (&out)[8]) {
  constexpr uint32_t kAtOnce = 8;  // asked for before the first is needed
  const float* from = parts.sums + size_t{token} * kPartRows + column % kPartRows;
#pragma unroll
  for (float& x : out) x = 0;
  for (uint32_t block = blocks.first; block <= blocks.last; block += kAtOnce) {
    float4 part[kAtOnce][2] = {};
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      if (block + i > blocks.last) continue;
      const float* at = from + size_t{blocks.place(block + i)} * parts.capacity * kPartRows;
      part[i][0] = __ldcg(reinterpret_cast<const float4*>(at));
      part[i][1] = __ldcg(reinterpret_cast<const float4*>(at + 4));
    }
#pragma unroll
    for (const auto& [low, high] : part) {
      out[0] += low.x, out[1] += low.y, out[2] += low.z, out[3] += low.w;
      out[4] += high.x, out[5] += high.y, out[6] += high.z, out[7] += high.w;
    }
  }
  scales.apply(parts, token, column, out);
#pragma unroll
  for (float& x : out) x = __bfloat162float(__float2bfloat16_rn(x));
}

}  // namespace gemma_cuda::cuda
