#include "cuda/sampler.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "cuda/check.h"

namespace gemma_cuda::cuda {
namespace {

// What a sequence's request and history do to its logits, one entry a token.
std::vector<Adjustment> adjustments(const SampleRow& row) {
  const SamplingConfig& config = *row.config;
  std::unordered_map<uint32_t, Adjustment> changes;
  auto change = [&](uint32_t token) -> Adjustment& {
    return changes.try_emplace(token, Adjustment{token, 0, 1, 0, 0}).first->second;
  };
  for (const TokenBias& bias : config.logit_bias) change(bias.token).bias += bias.bias;
  if (config.looks_back()) {
    std::unordered_map<uint32_t, uint32_t> generated;  // token -> times generated
    for (size_t i = 0; i < row.tokens.size(); ++i) generated[row.tokens[i]] += i >= row.prompt_tokens;
    for (const auto& [token, times] : generated) {
      Adjustment& entry = change(token);
      entry.repetition = config.repetition_penalty;
      if (times > 0) entry.subtract = config.presence_penalty + config.frequency_penalty * static_cast<float>(times);
    }
  }
  if (row.tokens.size() - row.prompt_tokens < config.min_new_tokens)
    for (uint32_t token : config.stop_tokens) change(token).forbidden = 1;
  std::vector<Adjustment> out;
  for (const auto& [token, entry] : changes) out.push_back(entry);
  return out;
}

}  // namespace

Sampler::~Sampler() {
  for (Lane& lane : lanes_)
    if (lane.done != nullptr) cudaEventDestroy(lane.done);
}

void Sampler::start(const float* logits, uint32_t vocab, std::span<const SampleRow> rows, uint32_t* last_tokens,
                    PinnedRing& ring, cudaStream_t stream) {
  std::vector<SampleTask> tasks;
  std::vector<Adjustment> changes;
  for (const SampleRow& row : rows) {
    const std::vector<Adjustment> own = adjustments(row);
    const SamplingConfig& config = *row.config;
    tasks.push_back({.row = row.row,
                     .slot = row.slot,
                     .scored = SampleTask::kSample,
                     .temperature = config.temperature,
                     .top_k = config.top_k,
                     .top_p = config.top_p,
                     .min_p = config.min_p,
                     .seed = config.seed,
                     .step = static_cast<uint32_t>(row.tokens.size() - row.prompt_tokens),
                     .top = std::min(config.top_logprobs, vocab),
                     .first_adjustment = static_cast<uint32_t>(changes.size()),
                     .end_adjustment = static_cast<uint32_t>(changes.size() + own.size())});
    changes.insert(changes.end(), own.begin(), own.end());
  }
  launch(const_cast<float*>(logits), vocab, std::move(tasks), changes, last_tokens, ring, stream);
}

void Sampler::start(const float* logits, uint32_t vocab, std::span<const ScoreRow> rows, PinnedRing& ring,
                    cudaStream_t stream) {
  std::vector<SampleTask> tasks;
  for (const ScoreRow& row : rows)
    tasks.push_back({.row = row.row,
                     .slot = 0,
                     .scored = row.token,
                     .temperature = 0,
                     .top_k = 0,
                     .top_p = 1,
                     .min_p = 0,
                     .seed = 0,
                     .step = 0,
                     .top = std::min(row.top_logprobs, vocab),
                     .first_adjustment = 0,
                     .end_adjustment = 0});
  launch(const_cast<float*>(logits), vocab, std::move(tasks), {}, nullptr, ring, stream);
}

size_t Sampler::reserved_bytes(uint32_t rows, uint32_t vocab) {
  const size_t row = sizeof(SampleTask) + kSurveyParts * sizeof(Survey) + sizeof(SampleResult);
  return rows * (row + kReservedTop * sizeof(TopEntry)) + vocab * (sizeof(Adjustment) + sizeof(float));
}

void Sampler::reserve(uint32_t rows, uint32_t vocab) {
  tasks_.get<SampleTask>(rows);
  changes_.get<Adjustment>(vocab);
  saved_.get<float>(vocab);
  surveys_.get<Survey>(size_t{rows} * kSurveyParts);
  results_.get<SampleResult>(rows);
  tops_.get<TopEntry>(size_t{rows} * kReservedTop);
  for (Lane& lane : lanes_) {
    lane.results.get<SampleResult>(rows);
    lane.tops.get<TopEntry>(size_t{rows} * kReservedTop);
  }
}

void Sampler::launch(float* logits, uint32_t vocab, std::vector<SampleTask> tasks,
                     const std::vector<Adjustment>& changes, uint32_t* last_tokens, PinnedRing& ring,
                     cudaStream_t stream) {
  if (unfinished_.size() == kLanes) throw Error::device("too many steps are under way");
  Lane& lane = lanes_[turn_++ % kLanes];
  if (lane.done == nullptr) GEMMA_CUDA_CHECK(cudaEventCreateWithFlags(&lane.done, cudaEventDisableTiming));
  lane.top.clear();
  lane.max_top = 0;
  for (const SampleTask& task : tasks) {
    lane.top.push_back(task.top);
    lane.max_top = std::max(lane.max_top, task.top);
  }
  const size_t count = tasks.size(), tops = count * lane.max_top;
  if (count > 0) {
    run(logits, vocab, tasks, changes, lane.max_top, last_tokens, ring, stream);
    GEMMA_CUDA_CHECK(cudaMemcpyAsync(lane.results.get<SampleResult>(count), results_.get<SampleResult>(count),
                                     count * sizeof(SampleResult), cudaMemcpyDeviceToHost, stream));
    if (tops > 0)
      GEMMA_CUDA_CHECK(cudaMemcpyAsync(lane.tops.get<TopEntry>(tops), tops_.get<TopEntry>(tops),
                                       tops * sizeof(TopEntry), cudaMemcpyDeviceToHost, stream));
  }
  GEMMA_CUDA_CHECK(cudaEventRecord(lane.done, stream));
  unfinished_.push_back(&lane);
}

// There is room for one adjustment a token of the vocabulary, the most that one row can have. Where the rows together
// have more, they go in groups.
void Sampler::run(float* logits, uint32_t vocab, std::vector<SampleTask>& tasks, const std::vector<Adjustment>& changes,
                  uint32_t max_top, uint32_t* last_tokens, PinnedRing& ring, cudaStream_t stream) {
  struct Group {
    size_t begin, end;
    uint32_t first_change, end_change;
  };
  std::vector<Group> groups;
  for (size_t i = 0; i < tasks.size(); ++i) {
    SampleTask& task = tasks[i];
    if (groups.empty() || task.end_adjustment - groups.back().first_change > vocab)
      groups.push_back({i, i, task.first_adjustment, task.first_adjustment});
    Group& group = groups.back();
    group.end = i + 1;
    group.end_change = task.end_adjustment;
    task.first_adjustment -= group.first_change;
    task.end_adjustment -= group.first_change;
  }
  const size_t count = tasks.size(), tops = count * max_top;
  SampleTask* device_tasks = tasks_.get<SampleTask>(count);
  TopEntry* device_tops = tops_.get<TopEntry>(tops);
  // A row may report fewer than max_top; all are copied.
  if (tops > 0) GEMMA_CUDA_CHECK(cudaMemsetAsync(device_tops, 0, tops * sizeof(TopEntry), stream));
  ring.upload(device_tasks, tasks.data(), count * sizeof(SampleTask), stream);
  for (const Group& group : groups) {
    Adjustment* adjustments = changes_.get<Adjustment>(vocab);
    if (const size_t size = group.end_change - group.first_change; size > 0)
      ring.upload(adjustments, changes.data() + group.first_change, size * sizeof(Adjustment), stream);
    cuda::sample(logits, vocab, device_tasks + group.begin, static_cast<uint32_t>(group.end - group.begin), adjustments,
                 saved_.get<float>(vocab), surveys_.get<Survey>(count * kSurveyParts),
                 results_.get<SampleResult>(count) + group.begin, device_tops + group.begin * max_top, max_top,
                 last_tokens, stream);
  }
}

std::vector<ScoredToken> Sampler::finish_oldest() {
  Lane& lane = *unfinished_.front();
  unfinished_.pop_front();
  return finish(lane);
}

std::vector<ScoredToken> Sampler::finish_newest() {
  Lane& lane = *unfinished_.back();
  unfinished_.pop_back();
  --turn_;  // the lanes of the calls before stay theirs
  return finish(lane);
}

size_t Sampler::device_bytes() const {
  size_t bytes = 0;
  for (const DeviceScratch* part : {&tasks_, &changes_, &saved_, &surveys_, &results_, &tops_}) bytes += part->bytes();
  return bytes;
}

std::vector<ScoredToken> Sampler::finish(Lane& lane) {
  GEMMA_CUDA_CHECK(cudaEventSynchronize(lane.done));
  std::vector<ScoredToken> out;
  const size_t count = lane.top.size();
  if (count == 0) return out;
  const SampleResult* results = lane.results.get<SampleResult>(count);
  TopEntry* tops = lane.tops.get<TopEntry>(count * lane.max_top);
  for (size_t i = 0; i < count; ++i) {
    const SampleResult& result = results[i];
    if (!result.finite)
      throw std::runtime_error("the model's logits are not finite; `gemma-cuda inspect --check` finds damaged weights");
    ScoredToken& token = out.emplace_back(ScoredToken{result.token, result.logit - result.log_mass, {}});
    const std::span<TopEntry> top(tops + i * lane.max_top, lane.top[i]);
    std::ranges::sort(top, [](const TopEntry& a, const TopEntry& b) {
      return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
    });
    for (const TopEntry& entry : top) token.top.push_back({entry.token, entry.logit - result.log_mass});
  }
  return out;
}

}  // namespace gemma_cuda::cuda
