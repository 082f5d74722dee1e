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
                    Tables& tables, cudaStream_t stream) {
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
  launch(const_cast<float*>(logits), vocab, tasks, changes, last_tokens, tables, stream);
}

void Sampler::start(const float* logits, uint32_t vocab, std::span<const ScoreRow> rows, Tables& tables,
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
  launch(const_cast<float*>(logits), vocab, tasks, {}, nullptr, tables, stream);
}

void Sampler::launch(float* logits, uint32_t vocab, const std::vector<SampleTask>& tasks,
                     const std::vector<Adjustment>& changes, uint32_t* last_tokens, Tables& tables,
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
    SampleTask* device_tasks = lane.tasks.get<SampleTask>(count);
    Adjustment* device_changes = lane.changes.get<Adjustment>(changes.size());
    SampleResult* results = lane.results.get<SampleResult>(count);
    TopEntry* device_tops = lane.tops.get<TopEntry>(tops);
    // A row may report fewer than max_top; all are copied.
    if (tops > 0) GEMMA_CUDA_CHECK(cudaMemsetAsync(device_tops, 0, tops * sizeof(TopEntry), stream));
    tables.upload(device_tasks, tasks.data(), count * sizeof(SampleTask), stream);
    if (!changes.empty()) tables.upload(device_changes, changes.data(), changes.size() * sizeof(Adjustment), stream);
    cuda::sample(logits, vocab, device_tasks, static_cast<uint32_t>(count), device_changes,
                 lane.saved.get<float>(changes.size()), lane.surveys.get<Survey>(count * kSurveyParts), results,
                 device_tops, lane.max_top, last_tokens, stream);
    GEMMA_CUDA_CHECK(cudaMemcpyAsync(lane.host_results.get<SampleResult>(count), results, count * sizeof(SampleResult),
                                     cudaMemcpyDeviceToHost, stream));
    if (tops > 0)
      GEMMA_CUDA_CHECK(cudaMemcpyAsync(lane.host_tops.get<TopEntry>(tops), device_tops, tops * sizeof(TopEntry),
                                       cudaMemcpyDeviceToHost, stream));
  }
  GEMMA_CUDA_CHECK(cudaEventRecord(lane.done, stream));
  unfinished_.push_back(&lane);
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
  for (const Lane& lane : lanes_)
    for (const DeviceScratch* part :
         {&lane.tasks, &lane.changes, &lane.saved, &lane.surveys, &lane.results, &lane.tops})
      bytes += part->bytes();
  return bytes;
}

std::vector<ScoredToken> Sampler::finish(Lane& lane) {
  GEMMA_CUDA_CHECK(cudaEventSynchronize(lane.done));
  std::vector<ScoredToken> out;
  const size_t count = lane.top.size();
  if (count == 0) return out;
  const SampleResult* results = lane.host_results.get<SampleResult>(count);
  TopEntry* tops = lane.host_tops.get<TopEntry>(count * lane.max_top);
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
