// How surveys of parts of a row (survey.h) are put together, in an order that the caller fixes.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/survey.h"

namespace gemma_cuda::cuda {

struct Best {
  float value;
  uint32_t token;
  __device__ void take(float other, uint32_t at) {
    if (other > value || (other == value && at < token)) value = other, token = at;
  }
};

__device__ inline float exp_of(float x) { return fast_exp2(x * 1.4426950408889634f); }

// What two parts of a row have together.
__device__ inline Survey join(const Survey& a, const Survey& b) {
  Best best{a.best, a.token};
  best.take(b.best, b.token);
  const auto weighed = [&](const Survey& s) { return s.sum == 0 ? 0 : s.sum * exp_of(s.best - best.value); };
  return {best.value, best.token, weighed(a) + weighed(b), a.finite & b.finite};
}
}  // namespace gemma_cuda::cuda
