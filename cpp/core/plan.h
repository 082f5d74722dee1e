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
#include "ops/backend.h"

namespace gemma_cuda {

struct BatchPlan {
  std::vector<uint32_t> ids;           // [t]
  std::vector<uint32_t> positions;     // [t]
  std::vector<uint32_t> slots;         // [t] page * page_size + offset
  std::vector<uint32_t> cu_seqlens;    // [s + 1]
  std::vector<uint32_t> kv_len;        // [s]
  std::vector<uint32_t> block_table;   // [s, max_pages]
  std::vector<uint32_t> logit_rows;    // [r] rows of t that need logits
  std::vector<QueryTile> query_tiles;  // of the sequences with several new tokens
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

// The tiles of all sequences with several new tokens, those that see the most keys first: when the last ones run, few
// multiprocessors wait for them.
std::vector<QueryTile> query_tiles(std::span<const uint32_t> cu_seqlens, std::span<const uint32_t> kv_len);

BatchPlan make_plan(std::span<const PlanItem> items, uint32_t page_size);

// What a captured pass has room for; any plan that fits can be filled up to it.
struct PassShape {
  uint32_t tokens, sequences, logit_rows, tiles, max_pages;
  bool fits(const BatchPlan& plan) const;
};

// The plan as a batch without a ragged layout has it: `sequences` times max_new rows. Those that are nobody's come
// last, belong to no sequence, and see and write nothing, but everything that works row by row computes them.
BatchPlan pad(const BatchPlan& plan, uint32_t sequences);

constexpr uint32_t kShortPrompts = 16;  // tiles of a captured pass beyond those that its tokens fill

// The shapes to capture, each larger than the one before in all but sequences: decode passes, then passes with prompts
// in them. Those of many tokens are left out; they take so much longer than their launches that nothing is gained.
std::vector<PassShape> captured_shapes(const PassShape& limits);

// The plan with tokens that belong to no sequence, sequences without tokens and tiles of nothing, up to the shape.
BatchPlan fill_up(const BatchPlan& plan, const PassShape& shape);

}  // namespace gemma_cuda
