// GeGLU: what a feed-forward block makes of the sums of gate and up.
#pragma once

#include "cuda/mma.cuh"

namespace gemma_cuda::cuda {

// gelu_tanh(gate) * up, gelu(g) being g * sigmoid(2 u), u = sqrt(2 / pi) (g + 0.044715 g^3), with the constants drawn
// together. Float32's precision but for a few units in the last place, which tanhf would have for twice the time;
// denormals, and what the sigmoid makes smaller than 2^-126, end as zeros.
__device__ inline float gated(float gate, float up) {
  constexpr float kFactor = -2 * 0.7978845608028654f * 1.4426950408889634f;
  const float power = fast_exp2(gate * fmaf(gate * gate, 0.044715f * kFactor, kFactor));
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + power));
  return gate * up * inverse;
}

}  // namespace gemma_cuda::cuda
