// The page pool against a plain account of who owns what.
#include <algorithm>
#include <map>
#include <set>

#include "check.h"
#include "core/pages.h"

using namespace gemma_cuda;

namespace {

struct Owner {
  std::vector<uint32_t> tokens, pages;
  PagePool::Chain chain = 0;
};

Owner compute(PagePool& pool, std::vector<uint32_t> tokens) {
  Owner owner{std::move(tokens), {}, 0};
  owner.pages = pool.take_prefix(owner.tokens, owner.chain);
  const uint32_t size = pool.page_size();
  while (owner.pages.size() * size < owner.tokens.size()) {
    const size_t at = owner.pages.size() * size;
    owner.pages.push_back(pool.take());
    if (at + size <= owner.tokens.size())
      owner.chain = pool.publish(owner.pages.back(), owner.chain, std::span(owner.tokens).subspan(at, size));
  }
  return owner;
}

void a_prefix_is_reused() {
  PagePool pool(8, 2, true);
  Owner first = compute(pool, {1, 2, 3, 4, 5});
  CHECK(pool.free() == 5);
  Owner second = compute(pool, {1, 2, 3, 4, 6, 7});  // shares [1 2] and [3 4]
  CHECK(second.pages[0] == first.pages[0] && second.pages[1] == first.pages[1] && second.pages[2] != first.pages[2]);
  CHECK(pool.free() == 4);
  pool.release(first.pages);
  pool.release(second.pages);
  CHECK(pool.free() == 8);
  PagePool::Chain chain;
  const std::vector<uint32_t> again = pool.take_prefix(std::vector<uint32_t>{1, 2, 3, 4}, chain);
  CHECK(again.size() == 1);  // never all of a sequence: its last token must be computed for its logits
  CHECK(pool.take_prefix(std::vector<uint32_t>{3, 4, 5}, chain).empty());  // the same page behind another start
}

void without_reuse_nothing_is_found() {
  PagePool pool(4, 1, false);
  Owner owner = compute(pool, {1, 2});
  pool.release(owner.pages);
  PagePool::Chain chain;
  CHECK(pool.take_prefix(std::vector<uint32_t>{1, 2, 3}, chain).empty());
}

// Random sequences over a tiny alphabet come and go: no page is ever handed to two owners unless both hold the same
// tokens in it, and every page comes back.
void random_traffic() {
  constexpr uint32_t kPages = 24, kSize = 3;
  PagePool pool(kPages, kSize, true);
  std::vector<Owner> alive;
  for (int round = 0; round < 20000; ++round) {
    if (!alive.empty() && (test::below(2) == 0 || pool.free() < 5)) {
      const size_t victim = test::below(static_cast<uint32_t>(alive.size()));
      pool.release(alive[victim].pages);
      alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(victim));
      continue;
    }
    if (pool.free() < 5) continue;
    std::vector<uint32_t> tokens(1 + test::below(15));
    for (uint32_t& token : tokens) token = test::below(2);
    alive.push_back(compute(pool, tokens));

    std::map<uint32_t, std::vector<uint32_t>> content;
    for (const Owner& owner : alive)
      for (size_t i = 0; i < owner.pages.size(); ++i) {
        const auto end =
            owner.tokens.begin() + static_cast<std::ptrdiff_t>(std::min((i + 1) * kSize, owner.tokens.size()));
        const std::vector<uint32_t> upto(owner.tokens.begin(), end);
        const auto [at, fresh] = content.emplace(owner.pages[i], upto);
        CHECK(fresh || (at->second == upto && upto.size() == (i + 1) * kSize));
      }
    CHECK(pool.free() + content.size() == kPages);
  }
  for (const Owner& owner : alive) pool.release(owner.pages);
  CHECK(pool.free() == kPages);
}

}  // namespace

int main() {
  a_prefix_is_reused();
  without_reuse_nothing_is_found();
  random_traffic();
}
