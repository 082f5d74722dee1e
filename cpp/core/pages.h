// Which pages of the KV cache belong to whom.
//
// A page full of tokens can be shared: it is published under what it holds (its tokens, and the chain of pages before
// it), and a later sequence that starts with the same tokens takes it over instead of computing it again. Pages nobody
// uses any more stay published until the room is needed; the least recently used goes first.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <span>
#include <vector>

namespace gemma_cuda {

class PagePool {
 public:
  // A run of full pages from the start of a sequence, by its content. 0 is the empty one.
  using Chain = uint64_t;

  PagePool(uint32_t pages, uint32_t page_size, bool reuse);

  uint32_t page_size() const { return page_size_; }
  uint32_t pages() const { return static_cast<uint32_t>(info_.size()); }
  // Pages take() can give: the empty ones, and those kept only for reuse.
  uint32_t free() const { return static_cast<uint32_t>(empty_.size() + kept_.size()); }

  // A page of one's own. The caller has asked free() first.
  uint32_t take();
  // The published pages that hold the first tokens of `tokens`, at most all but the last token; the caller owns them as
  // well now. `chain` becomes the run they form.
  std::vector<uint32_t> take_prefix(std::span<const uint32_t> tokens, Chain& chain);
  // Tells that `page` now holds `tokens` behind `before`; returns the longer run.
  Chain publish(uint32_t page, Chain before, std::span<const uint32_t> tokens);
  // Gives pages back, in the order of their tokens.
  void release(std::span<const uint32_t> pages);

 private:
  struct Key {
    Chain before;
    std::vector<uint32_t> tokens;
    auto operator<=>(const Key&) const = default;
  };
  struct Entry {
    uint32_t page;
    Chain chain;
  };
  using Published = std::map<Key, Entry>;
  struct Info {
    uint32_t owners = 0;
    Published::iterator published;       // published_.end() if it is not
    std::list<uint32_t>::iterator kept;  // its place in kept_, where it has no owner but is published
  };

  uint32_t page_size_;
  bool reuse_;
  std::vector<Info> info_;
  std::vector<uint32_t> empty_;  // owned by nobody, holding nothing of use
  std::list<uint32_t> kept_;     // owned by nobody, published; least recently used first
  Published published_;
  Chain next_chain_ = 1;
};

}  // namespace gemma_cuda
