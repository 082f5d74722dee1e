// What a step does with its rows of logits, as flat tables: a task a row, and how sequences' requests and histories
// change their logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/sampling.h"

namespace gemma_cuda {

struct SamplePlan {
  std::vector<SampleTask> tasks;
  std::vector<Adjustment> adjustments;
  uint32_t max_top = 0;  // the most log-probabilities a task reports

  // Picks the token that follows `tokens`, prompt and generated ones, of the sequence with this number.
  void pick(uint32_t row, uint32_t slot, const SamplingConfig& config, std::span<const uint32_t> tokens,
            uint32_t prompt_tokens, bool keeps_logits = false);
  // Looks `token` up.
  void score(uint32_t row, uint32_t token, uint32_t top_logprobs);

  // The same tasks in their order, as plans of no more than so many adjustments; one task must not have more.
  std::vector<SamplePlan> parts(size_t most_adjustments) const;
};

}  // namespace gemma_cuda
