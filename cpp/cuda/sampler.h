// The memory that sampling works in, and its results on their way to the host.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <deque>
#include <optional>
#include <vector>

#include "cuda/memory.h"
#include "cuda/sample.h"
#include "ops/backend.h"

namespace gemma_cuda::cuda {

class Sampler {
 public:
  Sampler() = default;
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;
  ~Sampler();

  // Takes the memory that steps of so many rows need. Only a step with more than kTopRoom log-probabilities a row takes
  // more, when it comes.
  void reserve(uint32_t rows, uint32_t vocab, const DeviceInfo& device, cudaStream_t stream);
  static size_t reserved_bytes(uint32_t rows, uint32_t vocab, const DeviceInfo& device);

  // Puts the kernels on the stream, always the same.
  void sample(const SampleArgs& args, const Stream& stream);
  // Of rows that are surveyed already.
  void sample(const SampleArgs& args, const Surveys& surveys, const Stream& stream);
  // Room for so many, up to the next step's.
  Survey* surveys(size_t count) { return surveys_.get<Survey>(count); }
  // Puts the copy of the results so far on it. At most kLanes of these may be unfinished.
  void start_results(uint32_t count, uint32_t max_top, cudaStream_t stream);
  // Waits for the oldest that is not finished. A row whose logits are not finite has no result.
  std::vector<std::optional<ScoredToken>> finish_results();

  size_t device_bytes() const;

 private:
  static constexpr size_t kLanes = 4;

  // What steps leave behind for the host.
  struct Lane {
    PinnedScratch results, tops;
    uint32_t count = 0, max_top = 0;
    cudaEvent_t done = nullptr;
  };

  TopEntry* tops(size_t rows, uint32_t max_top, cudaStream_t stream);
  SampleMemory memory(size_t rows, uint32_t vocab, uint32_t max_top, cudaStream_t stream);

  // On the device, for one step after the other.
  DeviceScratch saved_, surveys_, results_, tops_;
  DeviceScratch more_tops_;  // where there are more than kTopRoom; apart, since captured graphs point to tops_
  std::array<Lane, kLanes> lanes_;
  size_t turn_ = 0;
  std::deque<Lane*> unfinished_;
};

}  // namespace gemma_cuda::cuda
