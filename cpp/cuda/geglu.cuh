// GeGLU: what a feed-forward block makes of the sums of gate and up.
#pragma once

#include "cuda/mma.cuh"

namespace gemma_cuda::cuda {

// gelu_tanh(gate) * up. As in elementwise.cu, gelu(g) = g * sigmoid(2 u), but with the constants drawn together, and
// without what keeps denormals, or divisors over 2^126, right: they end as zeros.
__device__ inline float gated(float gate, float up) {
  constexpr float kFactor = -2 * 0.7978845608028654f * 1.4426950408889634f;
  const float power = fast_exp2(gate * fmaf(gate * gate, 0.044715f * kFactor, kFactor));
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + power));
  return gate * up * inverse;
}

}  // namespace gemma_cuda::cuda
