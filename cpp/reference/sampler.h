// Picks and scores tokens. A pure function of a row of logits, what is to be done with it, and the request's seed.
#pragma once

#include <optional>
#include <span>

#include "ops/backend.h"
#include "reference/kernels.h"

namespace gemma_cuda::reference {

// `adjustments` are the task's own. Nothing where the logits are not finite.
std::optional<ScoredToken> sample(const Kernels& kernels, std::span<const float> logits, const SampleTask& task,
                                  std::span<const Adjustment> adjustments);

}  // namespace gemma_cuda::reference
