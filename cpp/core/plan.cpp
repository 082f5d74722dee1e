#include "core/plan.h"

#include <algorithm>

#include "ops/backend.h"

namespace gemma_cuda {

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

BatchPlan fill_up(const BatchPlan& plan, uint32_t sequences, uint32_t max_pages) {
  BatchPlan full = plan;
  full.max_pages = max_pages;
  full.ids.resize(sequences, 0);
  full.positions.resize(sequences, 0);
  full.slots.resize(sequences, kNoSlot);
  full.kv_len.resize(sequences, 0);
  for (uint32_t row = plan.sequences(); row < sequences; ++row) {
    full.cu_seqlens.push_back(row + 1);
    full.logit_rows.push_back(row);
  }
  full.block_table.assign(size_t{sequences} * max_pages, 0);
  for (uint32_t row = 0; row < plan.sequences(); ++row)
    std::copy_n(plan.block_table.begin() + size_t{row} * plan.max_pages, plan.max_pages,
                full.block_table.begin() + size_t{row} * max_pages);
  return full;
}

}  // namespace gemma_cuda
