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

// How a logit changes before it competes: bias, then penalties.
struct Adjustment {
  uint32_t token;
  float bias;
  float repetition;    // divides a positive logit, multiplies another
  float subtract;      // presence and frequency penalties
  uint32_t forbidden;  // becomes -infinity
};

// What to do with a row of logits: pick its token, or look one up.
struct SampleTask {
  uint64_t seed = 0;
  uint32_t step = 0;  // with the seed: where the noise comes from
  uint32_t row;       // kNoRow: nothing, where a captured batch is filled up
  uint32_t slot = 0;  // the sequence's number, where a token is picked
  uint32_t scored;    // the token to look up; kPick: none, pick one
  float temperature = 0;
  uint32_t top_k = 0;
  float top_p = 1;
  float min_p = 0;
  uint32_t top;                                       // how many of the likeliest to report
  uint32_t first_adjustment = 0, end_adjustment = 0;  // of the table's, one a token
  uint32_t keeps_logits = 0;                          // 1: the row is read afterwards, whatever the task needs

  static constexpr uint32_t kPick = ~0u;
  static constexpr uint32_t kNoRow = ~0u;
  static constexpr SampleTask nothing() { return {.row = kNoRow, .scored = kPick, .top = 0}; }
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
