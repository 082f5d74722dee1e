// How a kernel writes a row that a product of FP8 will read (Quantize in ops/backend.h).
#pragma once

#include "cuda/vector.cuh"
#include "ops/backend.h"
#include "ops/convert.h"

namespace gemma_cuda::cuda {

// The scale of a row whose largest magnitude is this.
__device__ inline float dynamic_scale(float largest) { return largest == 0 ? 1.0f : largest / kE4m3Max; }

// Where one scale is given for all rows: the model's, so it can be asked for before the kernel before has ended.
__device__ inline float given_scale(const Quantize& how) { return how.scale != nullptr ? *how.scale : 1.0f; }

// What the elements of `row` are multiplied by to become FP8. Its scale is given, or made of the largest magnitude, and
// then left for the product by the block's first thread. To be called by the whole block.
__device__ inline float row_factor(const Quantize& how, float given, uint32_t row, float largest) {
  if (how.scale != nullptr) return 1.0f / given;
  const float scale = dynamic_scale(largest);
  if (threadIdx.x == 0) how.row_scales[row] = scale;
  return 1.0f / scale;
}

}  // namespace gemma_cuda::cuda
