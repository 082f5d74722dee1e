#include "core/plan.h"

#include <algorithm>

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

}  // namespace gemma_cuda
