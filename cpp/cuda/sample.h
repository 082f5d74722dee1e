// Sampling on the device, by the rules of the reference sampler (reference/sampler.cpp): same seed, same token, where
// the logits agree.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gemma_cuda::cuda {

// How a logit changes before it competes.
struct Adjustment {
  uint32_t token;
  float bias;
  float repetition;    // divides a positive logit, multiplies another
  float subtract;      // presence and frequency penalties
  uint32_t forbidden;  // becomes -infinity
};

struct SampleTask {
  uint32_t row;
  uint32_t slot;    // of last_tokens
  uint32_t scored;  // the token to look up; kSample: pick one
  float temperature;
  uint32_t top_k;  // 0: off
  float top_p;     // 1: off
  float min_p;     // 0: off
  uint64_t seed;
  uint32_t step;
  uint32_t top;                               // how many of the likeliest to report
  uint32_t first_adjustment, end_adjustment;  // of the call's adjustments, one a token
  static constexpr uint32_t kSample = ~0u;
};

struct SampleResult {
  uint32_t token;
  float logit;
  float log_mass;  // of the row: logprob = logit - log_mass
  uint32_t finite;
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

// tops is [tasks, max_top], each row's entries in no order; saved holds a float an adjustment, surveys [tasks,
// kSurveyParts]. The
// logits are changed while a task runs and restored.
void sample(float* logits, uint32_t vocab, const SampleTask* tasks, uint32_t count, const Adjustment* adjustments,
            float* saved, Survey* surveys, SampleResult* results, TopEntry* tops, uint32_t max_top,
            uint32_t* last_tokens, cudaStream_t stream);

}  // namespace gemma_cuda::cuda
