// The batch plan's tables for the example in its header.
#include <algorithm>

#include "check.h"
#include "core/plan.h"
#include "ops/backend.h"

using namespace gemma_cuda;

namespace {

Sequence sequence(uint32_t length, uint32_t cached, std::vector<uint32_t> pages, uint32_t base) {
  Sequence out;
  for (uint32_t i = 0; i < length; ++i) out.tokens.push_back(base + i);
  out.cached = cached;
  out.pages = std::move(pages);
  return out;
}

}  // namespace

int main() {
  using Table = std::vector<uint32_t>;
  const Sequence a = sequence(8, 5, {4, 1}, 100), b = sequence(10, 9, {0, 7}, 200), c = sequence(2, 0, {2}, 300);
  const PlanItem items[] = {{&a, 3, 1}, {&b, 1, 0}, {&c, 2, 2}};
  const BatchPlan plan = make_plan(items, 5);
  CHECK((plan.ids == Table{105, 106, 107, 209, 300, 301}));
  CHECK((plan.positions == Table{5, 6, 7, 9, 0, 1}));
  CHECK((plan.slots == Table{1 * 5 + 0, 1 * 5 + 1, 1 * 5 + 2, 7 * 5 + 4, 2 * 5 + 0, 2 * 5 + 1}));
  CHECK((plan.cu_seqlens == Table{0, 3, 4, 6}));
  CHECK((plan.kv_len == Table{8, 10, 2}));
  CHECK(plan.max_pages == 2);
  CHECK((plan.block_table == Table{4, 1, 0, 7, 2, 0}));
  CHECK((plan.logit_rows == Table{2, 4, 5}));

  // Four sequences of three tokens, one of which has ended: the filling is nobody's.
  const BatchPlan padded = pad(plan, 4);
  CHECK(padded.tokens() == 12 && padded.positions.size() == 12 && padded.slots.size() == 12);
  CHECK(std::equal(plan.ids.begin(), plan.ids.end(), padded.ids.begin()));
  for (uint32_t row = 6; row < 12; ++row)
    CHECK(padded.ids[row] == 0 && padded.positions[row] == 0 && padded.slots[row] == kNoSlot);
  CHECK(padded.cu_seqlens == plan.cu_seqlens && padded.kv_len == plan.kv_len && padded.max_new == 3);
  CHECK(padded.logit_rows == plan.logit_rows && padded.block_table == plan.block_table);
}
