// The host's side of sampling: requests to tasks, and results when the device has them.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <deque>
#include <span>
#include <vector>

#include "cuda/memory.h"
#include "cuda/sample.h"
#include "cuda/staging.h"
#include "ops/backend.h"

namespace gemma_cuda::cuda {

class Sampler {
 public:
  Sampler() = default;
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;
  ~Sampler();

  // Puts the work on the stream. At most kLanes calls may be unfinished.
  void start(const float* logits, uint32_t vocab, std::span<const SampleRow> rows, uint32_t* last_tokens,
             Tables& tables, cudaStream_t stream);
  void start(const float* logits, uint32_t vocab, std::span<const ScoreRow> rows, Tables& tables, cudaStream_t stream);
  // Waits for the oldest or the newest call that is not finished. Throws for a row that is not finite.
  std::vector<ScoredToken> finish_oldest();
  std::vector<ScoredToken> finish_newest();

  size_t device_bytes() const;

 private:
  static constexpr size_t kLanes = 4;

  struct Lane {
    DeviceScratch tasks, changes, saved, surveys, results, tops;
    PinnedScratch host_results, host_tops;
    std::vector<uint32_t> top;  // of each task
    uint32_t max_top = 0;
    cudaEvent_t done = nullptr;
  };

  void launch(float* logits, uint32_t vocab, const std::vector<SampleTask>& tasks,
              const std::vector<Adjustment>& changes, uint32_t* last_tokens, Tables& tables, cudaStream_t stream);
  static std::vector<ScoredToken> finish(Lane& lane);

  std::array<Lane, kLanes> lanes_;
  size_t turn_ = 0;
  std::deque<Lane*> unfinished_;
};

}  // namespace gemma_cuda::cuda
