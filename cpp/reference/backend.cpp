// The reference backend: every operation in plain C++ on the host's memory, rows and columns spread over threads.
// It is the oracle for other backends and the default where there is no GPU.
#include "ops/backend.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "core/error.h"
#include "ops/convert.h"
#include "ops/philox.h"
#include "reference/backend.h"
#include "reference/kernels.h"
#include "reference/sampler.h"
#include "support/thread_pool.h"

namespace gemma_cuda {
namespace reference {
namespace {

template <class To, class From>
void convert(void* to, const void* from, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i)
    static_cast<To*>(to)[i] = from_float<To>(to_float(static_cast<const From*>(from)[i]));
}

template <class To>
void convert_from(DType type, void* to, const void* from, size_t begin, size_t end) {
  switch (type) {
    case DType::f32: return convert<To, float>(to, from, begin, end);
    case DType::bf16: return convert<To, bf16>(to, from, begin, end);
    case DType::f16: return convert<To, f16>(to, from, begin, end);
    case DType::e4m3: return convert<To, e4m3>(to, from, begin, end);
  }
}

// Bytes that can be taken without swapping, as Linux reckons.
std::optional<uint64_t> available_memory() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    unsigned long long kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %llu kB", &kib) == 1) return uint64_t{kib} * 1024;
  }
  return std::nullopt;
}

// One group's magnitudes; by one thread.
template <class T>
void gather(const T* x, size_t count, float& largest, uint64_t* counts) {
  for (size_t i = 0; i < count; ++i) {
    const float magnitude = std::abs(to_float(x[i]));
    ++counts[magnitude_bin(std::bit_cast<uint32_t>(magnitude))];
    if (magnitude <= std::numeric_limits<float>::max()) largest = std::max(largest, magnitude);
  }
}

class ReferenceBackend final : public Backend {
 public:
  ReferenceBackend(uint32_t threads, const Kernels& kernels, DType act)
      : pool_(threads), kernels_(kernels), act_(act) {}

  std::string name() const override {
    return std::string("reference (CPU, ") + kernels_.name + ", " + std::to_string(pool_.threads()) +
           (pool_.threads() == 1 ? " thread)" : " threads)");
  }

  std::optional<uint64_t> free_memory() const override { return available_memory(); }
  // Its few rows of scratch are not worth counting.
  uint64_t workspace_bytes(const WorkLimits&) const override { return 0; }
  void reserve(const WorkLimits&) override {}
  MemoryUse memory() const override { return memory_; }

  double copy_bandwidth() override {
    constexpr size_t kBytes = size_t{256} << 20, kPiece = size_t{1} << 20;  // more than caches hold
    std::vector<char> from, to;
    try {
      from.resize(kBytes);
      to.resize(kBytes);
    } catch (const std::bad_alloc&) {
      throw Error::device("no " + std::to_string(2 * kBytes >> 20) +
                          " MiB are free to measure the copy bandwidth with");
    }
    double best = 0;
    for (int turn = 0; turn < 4; ++turn) {  // the first brings the threads and pages up
      const auto start = std::chrono::steady_clock::now();
      in_pieces(kBytes, kPiece,
                [&](size_t begin, size_t end) { std::memcpy(to.data() + begin, from.data() + begin, end - begin); });
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      best = std::max(best, 2 * kBytes / seconds.count());
    }
    return best;
  }

  void* allocate(size_t bytes) override {
    void* memory =
        std::aligned_alloc(kAlignment, (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment);
    if (memory == nullptr) throw Error::device("could not allocate " + std::to_string(bytes) + " bytes of memory");
    memory_.take(bytes);
    return memory;
  }
  void release(void* memory, size_t bytes) noexcept override {
    std::free(memory);
    memory_.give_back(bytes);
  }
  void upload(void* to, const void* host, size_t bytes) override { std::memcpy(to, host, bytes); }
  void download(void* host, const void* from, size_t bytes) override { std::memcpy(host, from, bytes); }

  void upload_as(void* to, DType to_type, const void* host, DType host_type, size_t count) override {
    in_pieces(count, size_t{1} << 16, [&](size_t begin, size_t end) {
      if (to_type == host_type)
        std::memcpy(static_cast<char*>(to) + begin * size_of(to_type),
                    static_cast<const char*>(host) + begin * size_of(to_type), (end - begin) * size_of(to_type));
      else if (to_type == DType::f32)
        convert_from<float>(host_type, to, host, begin, end);
      else
        convert_from<bf16>(host_type, to, host, begin, end);
    });
  }

  void fill_random(void* to, DType type, size_t count, uint64_t seed, float deviation) override {
    in_pieces(count, size_t{1} << 16, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        const float x = random_element(seed, i) * deviation;
        if (type == DType::f32)
          static_cast<float*>(to)[i] = x;
        else
          static_cast<bf16*>(to)[i] = to_bf16(x);
      }
    });
  }

  bool captures() const override { return false; }
  void tune(bool) override {}
  bool asynchronous() const override { return false; }
  std::unique_ptr<Graph> capture(const std::function<void()>&) override {
    throw Error::device("the reference backend has no graphs");
  }

  void gather_rows(const GatherArgs& args) override {
    for (uint32_t i = 0; i < args.count; ++i)
      std::memcpy(static_cast<char*>(args.to) + i * args.row_bytes,
                  static_cast<const char*>(args.from) + args.rows[i] * args.row_bytes, args.row_bytes);
  }

  void embed(const EmbedArgs& args) override {
    const uint32_t hidden = args.table.cols;
    pool_.run(args.tokens, [&](uint32_t t) {
      const uint32_t id = args.ids[t] < kPendingToken ? args.ids[t] : args.last_tokens[args.ids[t] - kPendingToken];
      const size_t from = size_t{id} * hidden;
      float* out = args.residual + size_t{t} * hidden;
      for (uint32_t i = 0; i < hidden; ++i)
        out[i] = args.scale * (args.table.dtype == DType::f32
                                   ? static_cast<const float*>(args.table.data)[from + i]
                                   : to_float(static_cast<const bf16*>(args.table.data)[from + i]));
    });
  }

  void norm(const NormArgs& args) override {
    pool_.run(args.tokens, [&](uint32_t row) { kernels_.norm_row(args, act_, row); });
  }

  void gemm(const GemmArgs& args) override {
    // Enough pieces that no thread waits long for another, each wide enough for the kernel's blocks.
    const uint32_t piece = std::max(kGemmBlock, args.w.rows / (pool_.threads() * 8) / kGemmBlock * kGemmBlock);
    in_pieces(args.w.rows, piece, [&](size_t begin, size_t end) {
      thread_local std::vector<bf16> scratch;
      if (args.w.dtype == DType::e4m3) scratch.resize(size_t{args.tokens + kGemmBlock} * args.w.cols);
      kernels_.gemm(args, act_, static_cast<uint32_t>(begin), static_cast<uint32_t>(end), scratch.data());
    });
  }

  void rope(const RopeArgs& args) override {
    pool_.run(args.tokens, [&](uint32_t row) { kernels_.rope_row(args, act_, row); });
  }

  void attention(const AttentionArgs& args) override {
    for (uint32_t s = 0; s < args.sequences; ++s) {
      const uint32_t begin = args.cu_seqlens[s], rows = args.cu_seqlens[s + 1] - begin;
      pool_.run(rows * args.heads, [&](uint32_t i) {
        const uint32_t row = i / args.heads, last = args.kv_len[s] - rows + row;
        const uint32_t first = args.window != 0 && last + 1 > args.window ? last + 1 - args.window : 0;
        thread_local std::vector<float> scores;
        scores.resize(last - first + 1 + 4);
        kernels_.attend(args, act_, begin + row, s, i % args.heads, first, last, scores.data());
      });
    }
  }

  void geglu(const GegluArgs& args) override {
    pool_.run(args.tokens, [&](uint32_t row) { kernels_.geglu_row(args, act_, row); });
  }

  void quantize(const QuantizeArgs& args) override {
    pool_.run(args.rows, [&](uint32_t row) { kernels_.quantize_row(args, row); });
  }

  void observe(const ObserveArgs& args) override {
    const uint32_t width = args.width / args.groups;
    pool_.run(args.groups, [&](uint32_t group) {
      for (uint32_t row = 0; row < args.rows; ++row)
        gather_at(args.x, size_t{row} * args.width + size_t{group} * width, width, args.to, group);
    });
  }
  void observe_cache(const ObserveCacheArgs& args) override {
    const KvLayer& cache = args.cache;
    pool_.run(cache.kv_heads, [&](uint32_t head) {
      for (uint32_t token = 0; token < args.tokens; ++token) {
        const uint32_t slot = args.slots[token];
        if (slot == kNoSlot) continue;
        const size_t row = (size_t{slot / cache.page_size} * cache.kv_heads + head) * cache.page_size;
        const size_t at = (row + slot % cache.page_size) * cache.head_dim;
        gather_at(cache.keys, at, cache.head_dim, args.keys, head);
        gather_at(cache.values, at, cache.head_dim, args.values, head);
      }
    });
  }

  void soft_cap(const SoftCapArgs& args) override {
    in_pieces(size_t{args.rows} * args.cols, 1u << 15,
              [&](size_t begin, size_t end) { kernels_.soft_cap(args.x + begin, end - begin, args.cap); });
  }

  void sample(const SampleArgs& args) override {
    results_.resize(args.first);
    for (uint32_t i = 0; i < args.count && args.tasks[i].row != SampleTask::kNoRow; ++i) {
      const SampleTask& task = args.tasks[i];
      results_.push_back(
          reference::sample(kernels_, {args.logits + size_t{task.row} * args.vocab, args.vocab}, task,
                            {args.adjustments + task.first_adjustment, args.adjustments + task.end_adjustment}));
      if (task.scored == SampleTask::kPick) args.last_tokens[task.slot] = results_.back() ? results_.back()->token : 0;
    }
  }
  void start_results(uint32_t count, uint32_t) override {
    results_.resize(count);
    started_.push_back(std::exchange(results_, {}));
  }
  std::vector<std::optional<ScoredToken>> finish_results() override {
    std::vector<std::optional<ScoredToken>> out = std::move(started_.front());
    started_.pop_front();
    return out;
  }

 private:
  // `count` elements of x from `at` on.
  void gather_at(const void* x, size_t at, size_t count, const Magnitudes& to, uint32_t group) {
    uint64_t* counts = to.counts + size_t{group} * kMagnitudeBins;
    if (act_ == DType::bf16)
      gather(static_cast<const bf16*>(x) + at, count, to.largest[group], counts);
    else
      gather(static_cast<const float*>(x) + at, count, to.largest[group], counts);
  }

  static constexpr size_t kAlignment = 64;

  template <class F>
  void in_pieces(size_t count, size_t piece, F body) {
    pool_.run(static_cast<uint32_t>((count + piece - 1) / piece),
              [&](uint32_t i) { body(i * piece, std::min(count, (i + 1) * piece)); });
  }

  ThreadPool pool_;
  const Kernels& kernels_;
  const DType act_;
  MemoryUse memory_;
  std::vector<std::optional<ScoredToken>> results_;  // of the step's tasks so far
  std::deque<std::vector<std::optional<ScoredToken>>> started_;
};

}  // namespace

std::unique_ptr<Backend> make_backend(uint32_t threads, const Kernels& kernels, DType act) {
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  return std::make_unique<ReferenceBackend>(threads, kernels, act);
}

}  // namespace reference

std::unique_ptr<Backend> make_reference_backend(uint32_t threads, DType act) {
  return reference::make_backend(threads, *reference::usable_kernels().back(), act);
}

}  // namespace gemma_cuda
