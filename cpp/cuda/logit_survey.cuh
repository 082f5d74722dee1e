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

// Adds a warp's sixteen tokens of the vocabulary to its surveys of 8 N rows of logits. Fragments are those of a product
// with the rows as its columns: a thread has the vocabulary's tokens `token`, eight apart, none from `vocab` on.
template <int N>
__device__ void add_to_surveys(Survey* surveys, const float (&logits)[N][4], const uint32_t (&token)[2],
                               uint32_t vocab) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float x[2] = {token[0] < vocab ? logits[i][e] : -INFINITY, token[1] < vocab ? logits[i][e + 2] : -INFINITY};
      float best = fmaxf(x[0], x[1]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, offset));
      const float base = best == -INFINITY ? 0 : best;
      float sum = exp_of(x[0] - base) + exp_of(x[1] - base);  // NaN, or infinity minus itself, stays in it
      uint32_t first = x[0] == best ? token[0] : x[1] == best ? token[1] : ~0u;
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) {
        sum += __shfl_xor_sync(~0u, sum, offset);
        first = min(first, __shfl_xor_sync(~0u, first, offset));
      }
      if (lane >= 4) continue;
      Survey& row = surveys[8 * i + 2 * lane + e];
      row = join(row, {best, first, sum, sum == sum});
    }
}

}  // namespace gemma_cuda::cuda
