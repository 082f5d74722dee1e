// Sampling on the device, by the rules of the reference sampler (reference/sampler.cpp): same seed, same token, where
// the logits agree.
#pragma once

#include <cstdint>

#include "cuda/ops.h"

namespace gemma_cuda::cuda {

struct SampleResult {
  uint32_t token;
  float logit;
  float log_mass;  // of the row: logprob = logit - log_mass
  uint32_t finite;
  uint32_t top;  // how many entries of `tops` are its own
};

struct TopEntry {
  uint32_t token;
  float logit;
};

// A part of a row of logits: its best, the sum of exp(logit - best), and whether none is NaN.
struct Survey {
  float best;
  uint32_t token;
  float sum;
  uint32_t finite;
};
constexpr uint32_t kSurveyParts = 32;  // of a row

struct SampleMemory {
  float* saved;           // one an adjustment
  Survey* surveys;        // [count, kSurveyParts]
  SampleResult* results;  // [count]
  TopEntry* tops;         // [count, max_top]; each row's entries in no order
};

void sample(const SampleArgs& args, const SampleMemory& memory, const Stream& stream);

}  // namespace gemma_cuda::cuda
