// One sequence: its tokens, and where their keys and values are.
#pragma once

#include <cstdint>
#include <vector>

#include "core/pages.h"
#include "ops/backend.h"

namespace gemma_cuda {

struct Sequence {
  std::vector<uint32_t> tokens;  // prompt, then generated; the last may be pending (ops/backend.h)
  uint32_t prompt_tokens = 0;
  uint32_t cached = 0;          // tokens whose keys and values are in the cache, or will be when it is their turn
  uint32_t published = 0;       // whole pages that others may take over
  uint64_t serial = 0;          // no other sequence has or had it
  std::vector<uint32_t> pages;  // token i is in pages[i / page_size]
  PagePool::Chain chain = 0;    // the run that its full pages form
  SamplingConfig sampling;
  bool failed = false;  // it has logits that are not finite, and can only be removed

  // Whether the last token is still being sampled.
  bool pending() const { return tokens.back() >= kPendingToken; }
  uint32_t length() const { return static_cast<uint32_t>(tokens.size()); }
};

}  // namespace gemma_cuda
