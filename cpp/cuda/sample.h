// Sampling on the device, by the rules of the reference sampler (reference/sampler.cpp): same seed, same token, where
// the logits agree.
#pragma once

#include <cstdint>

#include "cuda/ops.h"
#include "cuda/survey.h"

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

struct SampleMemory {
  float* saved;           // one an adjustment
  SampleResult* results;  // [count]
  TopEntry* tops;         // [count, max_top]; each row's entries in no order
};

constexpr uint32_t kSurveyParts = 32;  // of a row

// Surveys the row of every task, in kSurveyParts parts, to surveys [count, kSurveyParts].
void survey(const SampleArgs& args, Survey* surveys, const Stream& stream);
// Needs the surveys of all rows: that kernel's, or those that the product left which made the logits.
void sample(const SampleArgs& args, const Surveys& surveys, const SampleMemory& memory, const Stream& stream);

}  // namespace gemma_cuda::cuda
