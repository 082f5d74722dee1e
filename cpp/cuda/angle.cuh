// Sine and cosine of the large angles of rotary embeddings, in eight instructions.
#pragma once

namespace gemma_cuda::cuda {

// Of angles up to 2^20, to within 2^-20.8 of the exact values: 2^-21.2 of the hardware's functions, which are made for
// [-pi, pi], and 2^-23 of what brings the angle there. For that, whole turns are taken off
// in two parts. The first is exact: a turn's constant is a multiple of 2^-21, so the difference is one too, and has no
// more than 24 bits. The second lacks less than 2^-47 a turn.
__device__ inline void fast_sincos(float angle, float& sine, float& cosine) {
  constexpr float kTurn = 6.28318548f, kRest = -1.74845553e-7f;  // 2 pi is their sum
  constexpr float kRound = 0x1.8p23f;                            // leaves an integer
  const float turns = fmaf(angle, 0.159154943f, kRound) - kRound;
  angle = fmaf(-turns, kRest, fmaf(-turns, kTurn, angle));
  sine = __sinf(angle);
  cosine = __cosf(angle);
}

}  // namespace gemma_cuda::cuda
