// Picks and scores tokens. Pure functions of a row of logits, what its sequence has seen, and the request's seed.
#pragma once

#include <span>

#include "ops/backend.h"
#include "reference/kernels.h"

namespace gemma_cuda::reference {

ScoredToken sample_token(const Kernels& kernels, std::span<const float> logits, const SampleRow& row);
ScoredToken score_token(const Kernels& kernels, std::span<const float> logits, uint32_t token, uint32_t top_logprobs);

}  // namespace gemma_cuda::reference
