// The host's side of sampling: requests to tasks, and results when the device has them.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <deque>
#include <span>
#include <vector>

#include "cuda/memory.h"
#include "cuda/pinned_ring.h"
#include "cuda/sample.h"
#include "ops/backend.h"

namespace gemma_cuda::cuda {

class Sampler {
 public:
  Sampler() = default;
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;
  ~Sampler();

  // Takes the memory that calls of so many rows need. Only a call for more than kReservedTop log-probabilities a row
  // takes more, when it comes.
  void reserve(uint32_t rows, uint32_t vocab);
  static size_t reserved_bytes(uint32_t rows, uint32_t vocab);

  // Puts the work on the stream, always the same. At most kLanes calls may be unfinished.
  void start(const float* logits, uint32_t vocab, std::span<const SampleRow> rows, uint32_t* last_tokens,
             PinnedRing& ring, cudaStream_t stream);
  void start(const float* logits, uint32_t vocab, std::span<const ScoreRow> rows, PinnedRing& ring,
             cudaStream_t stream);
  // Waits for the oldest or the newest call that is not finished. Throws for a row that is not finite.
  std::vector<ScoredToken> finish_oldest();
  std::vector<ScoredToken> finish_newest();

  size_t device_bytes() const;

 private:
  static constexpr size_t kLanes = 4;
  static constexpr uint32_t kReservedTop = 20;

  // What calls leave behind for the host.
  struct Lane {
    PinnedScratch results, tops;
    std::vector<uint32_t> top;  // of each task
    uint32_t max_top = 0;
    cudaEvent_t done = nullptr;
  };

  void launch(float* logits, uint32_t vocab, std::vector<SampleTask> tasks, const std::vector<Adjustment>& changes,
              uint32_t* last_tokens, PinnedRing& ring, cudaStream_t stream);
  void run(float* logits, uint32_t vocab, std::vector<SampleTask>& tasks, const std::vector<Adjustment>& changes,
           uint32_t max_top, uint32_t* last_tokens, PinnedRing& ring, cudaStream_t stream);
  static std::vector<ScoredToken> finish(Lane& lane);

  // On the device, for one call after the other.
  DeviceScratch tasks_, changes_, saved_, surveys_, results_, tops_;
  std::array<Lane, kLanes> lanes_;
  size_t turn_ = 0;
  std::deque<Lane*> unfinished_;
};

}  // namespace gemma_cuda::cuda
