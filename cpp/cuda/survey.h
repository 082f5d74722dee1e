// What is known of a part of a row of logits before anything is drawn from it.
#pragma once

#include <cstdint>

namespace gemma_cuda::cuda {

// The best, the sum of exp(logit - best), and whether none is NaN.
struct Survey {
  float best;
  uint32_t token;
  float sum;
  uint32_t finite;
};

// Of rows, each in so many parts.
struct Surveys {
  const Survey* data;
  uint32_t parts;
  bool by_row;  // else by task
};

}  // namespace gemma_cuda::cuda
