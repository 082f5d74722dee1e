#include "core/plan.h"

#include <algorithm>
#include <functional>

namespace gemma_cuda {

std::vector<QueryTile> query_tiles(std::span<const uint32_t> cu_seqlens, std::span<const uint32_t> kv_len) {
  std::vector<QueryTile> tiles;
  for (uint32_t s = 0; s < kv_len.size(); ++s)
    if (const uint32_t rows = cu_seqlens[s + 1] - cu_seqlens[s]; rows > 1)
      for (uint32_t row = 0; row < rows; row += kQueryTile) tiles.push_back({s, row});
  // Keys that the last query of a tile sees.
  const auto keys = [&](const QueryTile& tile) {
    const uint32_t rows = cu_seqlens[tile.sequence + 1] - cu_seqlens[tile.sequence];
    return kv_len[tile.sequence] - rows + std::min(rows, tile.row + kQueryTile);
  };
  std::ranges::stable_sort(tiles, std::greater(), keys);
  return tiles;
}

BatchPlan make_plan(std::span<const PlanItem> items, uint32_t page_size) {
  BatchPlan plan;
  for (const PlanItem& item : items) {
    plan.max_pages = std::max(plan.max_pages, static_cast<uint32_t>(item.sequence->pages.size()));
    plan.max_new = std::max(plan.max_new, item.tokens);
  }

  plan.cu_seqlens.push_back(0);
  for (const PlanItem& item : items) {
    const Sequence& sequence = *item.sequence;
    const uint32_t end = sequence.cached + item.tokens;
    for (uint32_t position = sequence.cached; position < end; ++position) {
      plan.ids.push_back(sequence.tokens[position]);
      plan.positions.push_back(position);
      plan.slots.push_back(sequence.pages[position / page_size] * page_size + position % page_size);
    }
    for (uint32_t row = plan.tokens() - item.logit_rows; row < plan.tokens(); ++row) plan.logit_rows.push_back(row);
    plan.cu_seqlens.push_back(plan.tokens());
    plan.kv_len.push_back(end);
    plan.block_table.insert(plan.block_table.end(), sequence.pages.begin(), sequence.pages.end());
    plan.block_table.resize(size_t{plan.sequences()} * plan.max_pages, 0);
  }
  plan.query_tiles = query_tiles(plan.cu_seqlens, plan.kv_len);
  return plan;
}

BatchPlan pad(const BatchPlan& plan, uint32_t sequences) {
  BatchPlan padded = plan;
  const size_t rows = size_t{sequences} * plan.max_new;
  padded.ids.resize(rows, 0);
  padded.positions.resize(rows, 0);
  padded.slots.resize(rows, kNoSlot);
  return padded;
}

namespace {

constexpr uint32_t kCapturedTokens = 2048;  // at most

// Few sizes, none much too large.
uint32_t next_size(uint32_t size) {
  if (size < 4) return size * 2;
  if (size < 64) return size / 8 * 8 + 8;
  return size + (size < 256 ? 32 : size < 1024 ? 64 : 256);
}

void add_sizes(std::vector<PassShape>& shapes, uint32_t from, uint32_t most,
               const std::function<PassShape(uint32_t)>& at) {
  for (uint32_t size = from; size < most; size = next_size(size)) shapes.push_back(at(size));
  shapes.push_back(at(most));
}

}  // namespace

bool PassShape::fits(const BatchPlan& plan) const {
  return plan.tokens() <= tokens && plan.sequences() <= sequences && plan.logit_rows.size() <= logit_rows &&
         plan.query_tiles.size() <= tiles && plan.max_pages <= max_pages;
}

std::vector<PassShape> captured_shapes(const PassShape& limits) {
  std::vector<PassShape> shapes;
  const uint32_t decoding = std::min({limits.sequences, limits.tokens, limits.logit_rows});
  add_sizes(shapes, 1, decoding, [&](uint32_t size) { return PassShape{size, size, size, 0, limits.max_pages}; });
  add_sizes(shapes, std::min(64u, limits.tokens), std::min(kCapturedTokens, limits.tokens), [&](uint32_t size) {
    return PassShape{size, limits.sequences, decoding, size / kQueryTile + kShortPrompts, limits.max_pages};
  });
  return shapes;
}

BatchPlan fill_up(const BatchPlan& plan, const PassShape& shape) {
  BatchPlan full = plan;
  full.max_pages = shape.max_pages;
  full.ids.resize(shape.tokens, 0);
  full.positions.resize(shape.tokens, 0);
  full.slots.resize(shape.tokens, kNoSlot);
  full.cu_seqlens.resize(shape.sequences + 1, plan.cu_seqlens.back());
  full.kv_len.resize(shape.sequences, 0);
  full.logit_rows.resize(shape.logit_rows, 0);
  full.query_tiles.resize(shape.tiles, {kNoSequence, 0});
  full.block_table.assign(size_t{shape.sequences} * shape.max_pages, 0);
  for (uint32_t row = 0; row < plan.sequences(); ++row)
    std::copy_n(plan.block_table.begin() + size_t{row} * plan.max_pages, plan.max_pages,
                full.block_table.begin() + size_t{row} * shape.max_pages);
  return full;
}

}  // namespace gemma_cuda
