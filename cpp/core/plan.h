// Ragged work turned into flat tables: which tokens a step feeds, where they stand, where their keys and values go,
// and which rows of the result are looked at.
//
//   sequences    A: 3 new tokens, 5 cached     B: 1 new, 9 cached     C: 2 new, 0 cached
//   ids          [a5 a6 a7 b9 c0 c1]
//   positions    [5 6 7 9 0 1]
//   cu_seqlens   [0 3 4 6]
//   kv_len       [8 10 2]
//   block_table  [A: p4 p1 | B: p0 p7 | C: p2 -]      max_pages = 2
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/sequence.h"

namespace gemma_cuda {

struct BatchPlan {
  std::vector<uint32_t> ids;          // [t]
  std::vector<uint32_t> positions;    // [t]
  std::vector<uint32_t> slots;        // [t] page * page_size + offset
  std::vector<uint32_t> cu_seqlens;   // [s + 1]
  std::vector<uint32_t> kv_len;       // [s]
  std::vector<uint32_t> block_table;  // [s, max_pages]
  std::vector<uint32_t> logit_rows;   // [r] rows of t that need logits
  uint32_t max_pages = 0;
  uint32_t max_new = 0;  // most new tokens of one sequence

  uint32_t tokens() const { return static_cast<uint32_t>(ids.size()); }
  uint32_t sequences() const { return static_cast<uint32_t>(kv_len.size()); }
};

// One sequence's part: its next `tokens` known tokens, whose pages it already has.
struct PlanItem {
  const Sequence* sequence;
  uint32_t tokens;
  uint32_t logit_rows;  // the last so many of its rows need logits
};

BatchPlan make_plan(std::span<const PlanItem> items, uint32_t page_size);

// Sequences of the captured decode pass that serves so many: few sizes, none much too large.
constexpr uint32_t decode_bucket(uint32_t sequences) {
  for (uint32_t small : {1u, 2u, 4u})
    if (sequences <= small) return small;
  const uint32_t step = sequences <= 64 ? 8 : sequences <= 256 ? 32 : 128;
  return (sequences + step - 1) / step * step;
}

// The plan as a batch without a ragged layout has it: `sequences` times max_new rows. Those that are nobody's come
// last, belong to no sequence, and see and write nothing, but everything that works row by row computes them.
BatchPlan pad(const BatchPlan& plan, uint32_t sequences);

// The plan of a decode pass with rows that see and write nothing, up to `sequences`, and `max_pages` pages a row.
BatchPlan fill_up(const BatchPlan& plan, uint32_t sequences, uint32_t max_pages);

}  // namespace gemma_cuda
