#include "cuda/sampler.h"

#include <algorithm>
#include <span>

#include "cuda/check.h"
#include "cuda/skinny_gemm.h"

namespace gemma_cuda::cuda {

Sampler::~Sampler() {
  for (Lane& lane : lanes_)
    if (lane.done != nullptr) cudaEventDestroy(lane.done);
}

namespace {

size_t most_surveys(uint32_t rows, const DeviceInfo& device) {
  return std::max(size_t{rows} * kSurveyParts, skinny_surveys(std::min(rows, kSkinnyTokens), device));
}

}  // namespace

size_t Sampler::reserved_bytes(uint32_t rows, uint32_t vocab, const DeviceInfo& device) {
  const size_t row = sizeof(SampleResult) + kTopRoom * sizeof(TopEntry);
  return rows * row + vocab * sizeof(float) + most_surveys(rows, device) * sizeof(Survey);
}

void Sampler::reserve(uint32_t rows, uint32_t vocab, const DeviceInfo& device, cudaStream_t stream) {
  memory(rows, vocab, kTopRoom, stream);
  surveys(most_surveys(rows, device));
  for (Lane& lane : lanes_) {
    lane.results.get<SampleResult>(rows);
    lane.tops.get<TopEntry>(size_t{rows} * kTopRoom);
  }
}

TopEntry* Sampler::tops(size_t rows, uint32_t max_top, cudaStream_t stream) {
  DeviceScratch& scratch = max_top > kTopRoom ? more_tops_ : tops_;
  const size_t before = scratch.bytes();
  TopEntry* tops = scratch.get<TopEntry>(rows * max_top);
  // A row may report fewer than max_top; all are copied.
  if (scratch.bytes() > before) GEMMA_CUDA_CHECK(cudaMemsetAsync(tops, 0, scratch.bytes(), stream));
  return tops;
}

SampleMemory Sampler::memory(size_t rows, uint32_t vocab, uint32_t max_top, cudaStream_t stream) {
  return {saved_.get<float>(vocab), results_.get<SampleResult>(rows), tops(rows, max_top, stream)};
}

void Sampler::sample(const SampleArgs& args, const Stream& stream) {
  Survey* all = surveys(size_t{args.count} * kSurveyParts);
  survey(args, all, stream);
  sample(args, {all, kSurveyParts, false}, stream);
}

void Sampler::sample(const SampleArgs& args, const Surveys& surveys, const Stream& stream) {
  SampleMemory room = memory(size_t{args.first} + args.count, args.vocab, args.max_top, stream.stream);
  room.results += args.first;
  room.tops += size_t{args.first} * args.max_top;
  cuda::sample(args, surveys, room, stream);
}

void Sampler::start_results(uint32_t count, uint32_t max_top, cudaStream_t stream) {
  if (unfinished_.size() == kLanes) throw Error::device("too many steps are under way");
  Lane& lane = lanes_[turn_++ % kLanes];
  if (lane.done == nullptr) GEMMA_CUDA_CHECK(cudaEventCreateWithFlags(&lane.done, cudaEventDisableTiming));
  lane.count = count;
  lane.max_top = max_top;
  const size_t entries = size_t{count} * max_top;
  if (count > 0)
    copy_pinned(lane.results.get<SampleResult>(count), results_.get<SampleResult>(count), count * sizeof(SampleResult),
                stream);
  if (entries > 0)
    copy_pinned(lane.tops.get<TopEntry>(entries), tops(count, max_top, stream), entries * sizeof(TopEntry), stream);
  GEMMA_CUDA_CHECK(cudaEventRecord(lane.done, stream));
  unfinished_.push_back(&lane);
}

std::vector<std::optional<ScoredToken>> Sampler::finish_results() {
  Lane& lane = *unfinished_.front();
  unfinished_.pop_front();
  GEMMA_CUDA_CHECK(cudaEventSynchronize(lane.done));
  std::vector<std::optional<ScoredToken>> out;
  const SampleResult* results = lane.results.get<SampleResult>(lane.count);
  TopEntry* tops = lane.tops.get<TopEntry>(size_t{lane.count} * lane.max_top);
  for (size_t i = 0; i < lane.count; ++i) {
    const SampleResult& result = results[i];
    if (!result.finite) {
      out.emplace_back();
      continue;
    }
    ScoredToken& token = out.emplace_back().emplace(ScoredToken{result.token, result.logit - result.log_mass, {}});
    const std::span<TopEntry> top(tops + i * lane.max_top, result.top);
    std::ranges::sort(top, [](const TopEntry& a, const TopEntry& b) {
      return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
    });
    for (const TopEntry& entry : top) token.top.push_back({entry.token, entry.logit - result.log_mass});
  }
  return out;
}

size_t Sampler::device_bytes() const {
  size_t bytes = 0;
  for (const DeviceScratch* part : {&saved_, &surveys_, &results_, &tops_, &more_tops_}) bytes += part->bytes();
  return bytes;
}

}  // namespace gemma_cuda::cuda
