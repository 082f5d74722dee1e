#include "core/pages.h"

namespace gemma_cuda {

PagePool::PagePool(uint32_t pages, uint32_t page_size, bool reuse) : page_size_(page_size), reuse_(reuse) {
  info_.resize(pages);
  for (uint32_t page = pages; page-- > 0;) {
    info_[page].published = published_.end();
    empty_.push_back(page);
  }
}

uint32_t PagePool::take() {
  uint32_t page;
  if (!empty_.empty()) {
    page = empty_.back();
    empty_.pop_back();
  } else {
    page = kept_.front();
    kept_.pop_front();
    published_.erase(info_[page].published);
    info_[page].published = published_.end();
  }
  info_[page].owners = 1;
  return page;
}

std::vector<uint32_t> PagePool::take_prefix(std::span<const uint32_t> tokens, Chain& chain) {
  std::vector<uint32_t> pages;
  chain = 0;
  for (size_t at = 0; at + page_size_ < tokens.size(); at += page_size_) {
    const auto run = tokens.subspan(at, page_size_);
    const auto found = published_.find({chain, {run.begin(), run.end()}});
    if (found == published_.end()) break;
    Info& info = info_[found->second.page];
    if (info.owners++ == 0) kept_.erase(info.kept);
    pages.push_back(found->second.page);
    chain = found->second.chain;
  }
  return pages;
}

PagePool::Chain PagePool::publish(uint32_t page, Chain before, std::span<const uint32_t> tokens) {
  if (!reuse_) return 0;
  const auto [at, fresh] = published_.try_emplace({before, {tokens.begin(), tokens.end()}}, Entry{page, next_chain_});
  if (fresh) {
    ++next_chain_;
    info_[page].published = at;
  }
  return at->second.chain;  // where another page holds the same already, the run goes on from that one
}

void PagePool::release(std::span<const uint32_t> pages) {
  // From the end: a run is found from its start, so its end should be the first to go.
  for (size_t i = pages.size(); i-- > 0;) {
    Info& info = info_[pages[i]];
    if (--info.owners != 0) continue;
    if (info.published == published_.end())
      empty_.push_back(pages[i]);
    else
      info.kept = kept_.insert(kept_.end(), pages[i]);
  }
}

}  // namespace gemma_cuda
