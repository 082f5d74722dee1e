// Surveys (survey.h) of logits while they are still in the registers of the warpgroup products that made them.
#pragma once

#include "cuda/survey.cuh"
#include "ops/sampling.h"

namespace gemma_cuda::cuda {

// The rows, of up to 64, whose logits somebody will read, as bits: all but those of tasks that only pick the likeliest
// token, for which the survey is enough. To be called by whole warps.
__device__ inline uint64_t kept_rows(const SampleTask* tasks, uint32_t count) {
  uint64_t read = 0, surveyed = 0;
  for (uint32_t i = threadIdx.x % 32; i < count; i += 32) {
    const SampleTask task = tasks[i];
    if (task.row == SampleTask::kNoRow) continue;
    const bool best = task.scored == SampleTask::kPick && task.temperature == 0 && task.top == 0 &&
                      task.first_adjustment == task.end_adjustment && !task.keeps_logits;
    (best ? surveyed : read) |= uint64_t{1} << task.row;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    read |= __shfl_xor_sync(~0u, read, offset);
    surveyed |= __shfl_xor_sync(~0u, surveyed, offset);
  }
  return read | ~surveyed;
}

// What the eight lanes of a warp that have the same columns of N fragments have in each of them together, by `op`. A
// lane is left with the columns of one fragment: in every step it hands one half of them over and keeps the other, as
// long as there are halves. Pairs of lanes are the same for every N, and so is the order in which numbers are added.
template <int N, class T, class Op>
__device__ void reduce_columns(T (&x)[N][2], Op op) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int offset = 4 << step, half = N >> (step + 1);
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < (half > 0 ? half : 1); ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const T keep = half > 0 && upper ? x[i + half][e] : x[i][e],
                give = half > 0 && !upper ? x[i + half][e] : x[i][e];
        x[i][e] = op(keep, __shfl_xor_sync(~0u, give, offset));
      }
  }
}
// The fragment.
template <int N>
__device__ uint32_t reduced_fragment() {
  uint32_t fragment = 0;
#pragma unroll
  for (int step = 0; step < 3; ++step) fragment += (threadIdx.x >> (2 + step) & 1) * (N >> (step + 1));
  return fragment;
}
// The way back: all of them to all eight lanes.
template <int N>
__device__ void share_columns(float (&x)[N][2]) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 2; step >= 0; --step) {
    const int offset = 4 << step, half = N >> (step + 1);
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float mine = x[i][e], other = __shfl_xor_sync(~0u, mine, offset);
        x[i][e] = upper ? other : mine;
        x[i + half][e] = upper ? mine : other;
      }
  }
}

// Adds a warp's sixteen tokens of the vocabulary to its surveys of 8 N rows of logits. Fragments are those of a product
// with the rows as its columns: a thread has the vocabulary's tokens `token`, eight apart, none from `vocab` on.
template <int N>
__device__ void add_to_surveys(Survey* surveys, const float (&logits)[N][4], const uint32_t (&token)[2],
                               uint32_t vocab) {
  const auto logit = [&](int i, int e, int t) { return token[t] < vocab ? logits[i][e + 2 * t] : -INFINITY; };
  float best[N][2], sum[N][2];
  uint32_t first[N][2];
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e) best[i][e] = fmaxf(logit(i, e, 0), logit(i, e, 1));
  reduce_columns(best, [](float a, float b) { return fmaxf(a, b); });
  const float own[2] = {best[0][0], best[0][1]};
  share_columns(best);
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float x[2] = {logit(i, e, 0), logit(i, e, 1)}, base = best[i][e] == -INFINITY ? 0 : best[i][e];
      sum[i][e] = exp_of(x[0] - base) + exp_of(x[1] - base);  // NaN, or infinity minus itself, stays in it
      first[i][e] = x[0] == best[i][e] ? token[0] : x[1] == best[i][e] ? token[1] : ~0u;
    }
  reduce_columns(sum, [](float a, float b) { return a + b; });
  reduce_columns(first, [](uint32_t a, uint32_t b) { return min(a, b); });
  const uint32_t lane = threadIdx.x % 32;
  if (lane >= 4 * N) return;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    Survey& row = surveys[8 * reduced_fragment<N>() + 2 * (lane % 4) + e];
    row = join(row, {own[e], first[0][e], sum[0][e], sum[0][e] == sum[0][e]});
  }
}

}  // namespace gemma_cuda::cuda
