#include "core/sample_plan.h"

#include <algorithm>
#include <unordered_map>

namespace gemma_cuda {
namespace {

// One entry a token. A repeated token counts once for repetition (over prompt and output) and presence (over output),
// each time for frequency (over output).
std::vector<Adjustment> adjustments_of(const SamplingConfig& config, std::span<const uint32_t> tokens,
                                       uint32_t prompt_tokens) {
  std::unordered_map<uint32_t, Adjustment> changes;
  auto change = [&](uint32_t token) -> Adjustment& {
    return changes.try_emplace(token, Adjustment{token, 0, 1, 0, 0}).first->second;
  };
  for (const TokenBias& bias : config.logit_bias) change(bias.token).bias += bias.bias;
  if (config.looks_back()) {
    std::unordered_map<uint32_t, uint32_t> generated;  // token -> times generated
    for (size_t i = 0; i < tokens.size(); ++i) generated[tokens[i]] += i >= prompt_tokens;
    for (const auto& [token, times] : generated) {
      Adjustment& entry = change(token);
      entry.repetition = config.repetition_penalty;
      if (times > 0) entry.subtract = config.presence_penalty + config.frequency_penalty * static_cast<float>(times);
    }
  }
  if (tokens.size() - prompt_tokens < config.min_new_tokens)
    for (uint32_t token : config.stop_tokens) change(token).forbidden = 1;
  std::vector<Adjustment> out;
  for (const auto& [token, entry] : changes) out.push_back(entry);
  return out;
}

}  // namespace

void SamplePlan::pick(uint32_t row, uint32_t slot, const SamplingConfig& config, std::span<const uint32_t> tokens,
                      uint32_t prompt_tokens, bool keeps_logits) {
  const std::vector<Adjustment> own = adjustments_of(config, tokens, prompt_tokens);
  const uint32_t first = static_cast<uint32_t>(adjustments.size());
  adjustments.insert(adjustments.end(), own.begin(), own.end());
  tasks.push_back({.seed = config.seed,
                   .step = static_cast<uint32_t>(tokens.size() - prompt_tokens),
                   .row = row,
                   .slot = slot,
                   .scored = SampleTask::kPick,
                   .temperature = config.temperature,
                   .top_k = config.top_k,
                   .top_p = config.top_p,
                   .min_p = config.min_p,
                   .top = config.top_logprobs,
                   .first_adjustment = first,
                   .end_adjustment = static_cast<uint32_t>(adjustments.size()),
                   .keeps_logits = keeps_logits});
  max_top = std::max(max_top, config.top_logprobs);
}

void SamplePlan::score(uint32_t row, uint32_t token, uint32_t top_logprobs) {
  tasks.push_back({.row = row, .scored = token, .top = top_logprobs});
  max_top = std::max(max_top, top_logprobs);
}

std::vector<SamplePlan> SamplePlan::parts(size_t most_adjustments) const {
  std::vector<SamplePlan> out;
  for (SampleTask task : tasks) {
    const std::span own(adjustments.begin() + task.first_adjustment, adjustments.begin() + task.end_adjustment);
    if (out.empty() || out.back().adjustments.size() + own.size() > most_adjustments)
      out.emplace_back().max_top = max_top;
    SamplePlan& part = out.back();
    task.first_adjustment = static_cast<uint32_t>(part.adjustments.size());
    part.adjustments.insert(part.adjustments.end(), own.begin(), own.end());
    task.end_adjustment = static_cast<uint32_t>(part.adjustments.size());
    part.tasks.push_back(task);
  }
  return out;
}

}  // namespace gemma_cuda
