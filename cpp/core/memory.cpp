#include "core/memory.h"

#include <algorithm>
#include <cstdio>
#include <optional>

#include "core/error.h"

namespace gemma_cuda {
namespace {

std::string text(uint64_t bytes) {
  char out[40];
  if (bytes >> 30 > 0)
    std::snprintf(out, sizeof out, "%.1f GiB", static_cast<double>(bytes) / (1u << 30));
  else
    std::snprintf(out, sizeof out, "%.1f MiB", static_cast<double>(bytes) / (1u << 20));
  return out;
}

MemoryBudget budget_on(const Backend& backend, const ModelSpec& spec, const EngineOptions& options) {
  MemoryBudget budget = memory_budget(spec, options);
  budget.workspace = backend.workspace_bytes(work_limits(spec, options));
  return budget;
}

// Pages of the KV cache that fit beside the rest.
uint64_t pages_that_fit(const MemoryBudget& budget, const EngineOptions& options, uint64_t free) {
  const uint64_t rest = budget.total() - budget.kv_cache, page = budget.kv_cache / options.pages;
  return rest >= free ? 0 : std::min<uint64_t>(options.pages, (free - rest) / std::max<uint64_t>(page, 1));
}

// How an engine differs from the one that was asked for, in the options' own words.
std::string differences(const EngineOptions& options, const EngineOptions& asked) {
  std::string out;
  auto add = [&](const std::string& name, uint64_t value, const char* unit, uint64_t instead_of) {
    if (value != instead_of)
      out += (out.empty() ? "" : ", ") + name + " " + std::to_string(value) + unit + " instead of " +
             std::to_string(instead_of);
  };
  add("a KV cache of", uint64_t{options.pages} * options.page_size, " tokens", uint64_t{asked.pages} * asked.page_size);
  add("max_sequences", options.max_sequences, "", asked.max_sequences);
  add("max_batch_tokens", options.max_batch_tokens, "", asked.max_batch_tokens);
  add("max_logit_rows", options.max_logit_rows, "", asked.max_logit_rows);
  return out;
}

// The first of ever smaller engines that has room for a page a sequence.
std::string what_fits(const ModelSpec& spec, const EngineOptions& asked, const Backend& backend, uint64_t free) {
  EngineOptions options = asked;
  for (;;) {
    const MemoryBudget budget = budget_on(backend, spec, options);
    const uint64_t pages = pages_that_fit(budget, options, free);
    if (pages >= std::min(options.max_sequences, options.pages)) {
      options.pages = static_cast<uint32_t>(pages);
      return "It fits with " + differences(options, asked);
    }
    if (options.max_sequences == 1 && options.max_batch_tokens == 1 && options.max_logit_rows == 1)
      return "One sequence at a time needs " + text(budget.total() - budget.kv_cache) +
             " and a KV cache: use a smaller model or a device with more memory";
    for (uint32_t* number : {&options.max_sequences, &options.max_batch_tokens, &options.max_logit_rows})
      *number = std::max(*number / 2, 1u);
  }
}

}  // namespace

WorkLimits work_limits(const ModelSpec& spec, const EngineOptions& options) {
  WorkLimits limits;
  for (const LayerSpec& layer : spec.layers) {
    limits.head_dim = std::max(limits.head_dim, layer.head_dim);
    limits.group = std::max(limits.group, layer.heads / layer.kv_heads);
  }
  limits.logit_rows = options.max_logit_rows;
  limits.vocab = spec.vocab_size;
  return limits;
}

void require_room(const ModelSpec& spec, const EngineOptions& options, const Backend& backend) {
  const std::optional<uint64_t> free = backend.free_memory();
  const MemoryBudget budget = budget_on(backend, spec, options);
  if (!free.has_value() || budget.total() <= *free) return;
  throw Error::device("the model needs " + text(budget.total()) + " on " + backend.name() + ": weights " +
                      text(budget.weights) + ", KV cache " + text(budget.kv_cache) + ", activations " +
                      text(budget.activations) + ", logits " + text(budget.logits) + ", workspace " +
                      text(budget.workspace) + "; " + text(*free) + " are free. " +
                      what_fits(spec, options, backend, *free));
}

}  // namespace gemma_cuda
