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

using Table = std::vector<uint32_t>;

// Longest work first: 0 has 300 new tokens of 300, 1 is a decode row, 2 has 2 new of 5000.
void tiles() {
  const std::vector<QueryTile> tiles = query_tiles(Table{0, 300, 301, 303}, Table{300, 900, 5000});
  CHECK((tiles == std::vector<QueryTile>{{2, 0}, {0, 256}, {0, 128}, {0, 0}}));
}

void filling_up(const BatchPlan& plan) {
  const PassShape shape{8, 4, 5, 3, 3};
  CHECK(shape.fits(plan));
  for (const PassShape& small : {PassShape{5, 4, 5, 3, 3}, PassShape{8, 2, 5, 3, 3}, PassShape{8, 4, 2, 3, 3},
                                 PassShape{8, 4, 5, 1, 3}, PassShape{8, 4, 5, 3, 1}})
    CHECK(!small.fits(plan));
  const BatchPlan full = fill_up(plan, shape);
  CHECK(full.tokens() == 8 && full.slots[5] != kNoSlot && full.slots[6] == kNoSlot);
  CHECK((full.cu_seqlens == Table{0, 3, 4, 6, 6}));
  CHECK((full.kv_len == Table{8, 10, 2, 0}));
  CHECK((full.block_table == Table{4, 1, 0, 0, 7, 0, 2, 0, 0, 0, 0, 0}));
  CHECK(full.query_tiles.size() == 3 && full.query_tiles[2].sequence == kNoSequence);
  CHECK(full.logit_rows.size() == 5);

  // Whatever a step may hold finds a shape, up to the size beyond which capturing is not worth it.
  const PassShape limits{8192, 100, 100, 64, 9};
  const std::vector<PassShape> shapes = captured_shapes(limits);
  CHECK(shapes.front().tokens == 1 && shapes.front().tiles == 0 && shapes.back().tokens == 2048);
  CHECK(std::ranges::any_of(shapes, [](const PassShape& s) { return s.tokens == 100 && s.tiles == 0; }));
  for (const PassShape& s : shapes) CHECK(s.sequences <= 100 && s.logit_rows <= 100 && s.tokens <= 2048);
  CHECK(captured_shapes({1, 1, 1, 0, 1}).size() == 2);
}

}  // namespace

int main() {
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
  tiles();
  filling_up(plan);

  // Four sequences of three tokens, one of which has ended: the filling is nobody's.
  const BatchPlan padded = pad(plan, 4);
  CHECK(padded.tokens() == 12 && padded.positions.size() == 12 && padded.slots.size() == 12);
  CHECK(std::equal(plan.ids.begin(), plan.ids.end(), padded.ids.begin()));
  for (uint32_t row = 6; row < 12; ++row)
    CHECK(padded.ids[row] == 0 && padded.positions[row] == 0 && padded.slots[row] == kNoSlot);
  CHECK(padded.cu_seqlens == plan.cu_seqlens && padded.kv_len == plan.kv_len && padded.max_new == 3);
  CHECK(padded.logit_rows == plan.logit_rows && padded.block_table == plan.block_table);
}
