// What the sampler is told and what it tells: plain data shared by every backend.
#pragma once

#include <cstdint>
#include <vector>

namespace gemma_cuda {

struct TokenBias {
  uint32_t token;
  float bias;
};

// Filters apply in this order: bias, penalties, minimum length, temperature, top-k, top-p, min-p.
struct SamplingConfig {
  float temperature = 0.0f;         // 0: greedy
  uint32_t top_k = 0;               // 0: off
  float top_p = 1.0f;               // 1: off
  float min_p = 0.0f;               // 0: off
  float repetition_penalty = 1.0f;  // 1: off; over prompt and generated tokens
  float presence_penalty = 0.0f;    // over generated tokens
  float frequency_penalty = 0.0f;   // over generated tokens, per occurrence
  uint64_t seed = 0;
  std::vector<TokenBias> logit_bias;
  std::vector<uint32_t> stop_tokens;  // cannot be sampled before min_new_tokens others were
  uint32_t min_new_tokens = 0;
  uint32_t top_logprobs = 0;  // how many of the likeliest tokens to report

  // Whether the tokens so far change what comes next.
  bool looks_back() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
};

struct TokenLogprob {
  uint32_t token;
  float logprob;
};

// A token, its log-probability under the model (before bias, penalties and temperature), and the likeliest ones.
struct ScoredToken {
  uint32_t token = 0;
  float logprob = 0.0f;
  std::vector<TokenLogprob> top;
};

}  // namespace gemma_cuda
