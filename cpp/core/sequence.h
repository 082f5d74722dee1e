// One sequence: its tokens, and where their keys and values are.
#pragma once

#include <cstdint>
#include <vector>

#include "core/pages.h"
#include "ops/sampling.h"

namespace gemma_cuda {

struct Sequence {
  std::vector<uint32_t> tokens;  // known: prompt, then generated
  uint32_t prompt_tokens = 0;
  uint32_t cached = 0;          // tokens whose keys and values are in the cache
  std::vector<uint32_t> pages;  // token i is in pages[i / page_size]
  PagePool::Chain chain = 0;    // the run that its full pages form
  SamplingConfig sampling;

  uint32_t length() const { return static_cast<uint32_t>(tokens.size()); }
};

}  // namespace gemma_cuda
