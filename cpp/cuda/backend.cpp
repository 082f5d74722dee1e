#include "cuda/backend.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <unordered_map>

#include "cuda/check.h"
#include "cuda/gemm.h"
#include "cuda/memory.h"
#include "cuda/ops.h"
#include "cuda/sample.h"
#include "cuda/staging.h"

namespace gemma_cuda::cuda {
namespace {

// Makes the device current for this thread, and the one before current again.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    GEMMA_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != device) GEMMA_CUDA_CHECK(cudaSetDevice(device));
    device_ = device;
  }
  ~DeviceScope() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0, device_ = 0;
};

void require_usable(int index) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw Error::device(std::string("no usable NVIDIA driver: ") + cudaGetErrorString(status));
  }
  if (index < 0 || index >= count)
    throw Error::device("there is no device cuda:" + std::to_string(index) + "; this machine has " +
                        (count == 0 ? "no GPU" : "cuda:0 to cuda:" + std::to_string(count - 1)));
}

DeviceInfo device_info(int index) {
  auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    GEMMA_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  DeviceInfo info;
  info.index = index;
  info.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  info.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  info.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  if (info.capability < 80)
    throw Error::device("cuda:" + std::to_string(index) + " is sm_" + std::to_string(info.capability) +
                        "; bf16 needs sm_80 (Ampere) or newer");
  return info;
}

// What a sequence's request and history do to its logits, one entry a token.
std::vector<Adjustment> adjustments(const SampleRow& row) {
  const SamplingConfig& config = *row.config;
  std::unordered_map<uint32_t, Adjustment> changes;
  auto change = [&](uint32_t token) -> Adjustment& {
    return changes.try_emplace(token, Adjustment{token, 0, 1, 0, 0}).first->second;
  };
  for (const TokenBias& bias : config.logit_bias) change(bias.token).bias += bias.bias;
  if (config.repetition_penalty != 1 || config.presence_penalty != 0 || config.frequency_penalty != 0) {
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

// Launches on the stream it was recorded from.
class CapturedGraph final : public Graph {
 public:
  CapturedGraph(int device, cudaStream_t stream, const std::function<void()>& work) : device_(device), stream_(stream) {
    cudaGraph_t graph = nullptr;
    GEMMA_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      work();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);  // the stream is usable again; the first error is the one to tell
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    GEMMA_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
  }
  ~CapturedGraph() override { cudaGraphExecDestroy(executable_); }
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;

  void launch() override {
    const DeviceScope scope(device_);
    GEMMA_CUDA_CHECK(cudaGraphLaunch(executable_, stream_));
  }

 private:
  int device_;
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
};

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int index) : device_(device_info(index)) {
    const DeviceScope scope(index);
    GEMMA_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    gemm_ = std::make_unique<Gemm>(gemm_workspace_.get<char>(Gemm::kWorkspaceBytes));
  }
  ~CudaBackend() override {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device_.index);
    cudaStreamSynchronize(stream_);
    gemm_.reset();
    cudaStreamDestroy(stream_);
    cudaSetDevice(before);
  }

  std::string name() const override {
    cudaDeviceProp properties;
    GEMMA_CUDA_CHECK(cudaGetDeviceProperties(&properties, device_.index));
    char text[400];
    std::snprintf(text, sizeof text, "cuda:%d (%s, sm_%d, %.1f GiB)", device_.index, properties.name,
                  device_.capability, static_cast<double>(properties.totalGlobalMem) / (1u << 30));
    return text;
  }

  void* allocate(size_t bytes) override {
    const DeviceScope scope(device_.index);
    void* memory = allocate_device(bytes);
    // Rows that only fill up a batch are read before they are ever written; let them be numbers.
    GEMMA_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream_));
    return memory;
  }
  void release(void* memory) noexcept override { cudaFree(memory); }  // waits for what uses it
  void upload(void* to, const void* host, size_t bytes) override {
    const DeviceScope scope(device_.index);
    if (bytes <= Tables::kBytes)
      tables_ring_.upload(to, host, bytes, stream_);
    else
      staging_.upload(to, DType::bf16, host, DType::bf16, bytes / 2, stream_);
  }
  void download(void* host, const void* from, size_t bytes) override {
    const DeviceScope scope(device_.index);
    GEMMA_CUDA_CHECK(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, stream_));
    GEMMA_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }
  void upload_as(void* to, DType to_type, const void* host, DType host_type, size_t count) override {
    const DeviceScope scope(device_.index);
    staging_.upload(to, to_type, host, host_type, count, stream_);
  }

  void fill_random(void* to, DType type, size_t count, uint64_t seed, float deviation) override {
    on_device([&] { cuda::fill_random(to, type, count, seed, deviation, stream_); });
  }

  bool captures() const override { return true; }
  std::unique_ptr<Graph> capture(const std::function<void()>& work) override {
    const DeviceScope scope(device_.index);
    return std::make_unique<CapturedGraph>(device_.index, stream_, work);
  }

  void embed(const EmbedArgs& args) override {
    on_device([&] { cuda::embed(args, stream_); });
  }
  void norm(const NormArgs& args) override {
    on_device([&] { cuda::norm(args, stream_); });
  }
  void gemm(const GemmArgs& args) override {
    on_device([&] { gemm_->run(args, stream_); });
  }
  void rope(const RopeArgs& args) override {
    on_device([&] { cuda::rope(args, stream_); });
  }
  void geglu(const GegluArgs& args) override {
    on_device([&] { cuda::geglu(args, stream_); });
  }
  void soft_cap(const SoftCapArgs& args) override {
    on_device([&] { cuda::soft_cap(args, stream_); });
  }
  void attention(const AttentionArgs& args) override {
    on_device([&] {
      const size_t scratch = decode_scratch_bytes(device_, args.cache.head_dim, args.heads / args.cache.kv_heads);
      decode_attention(args, device_, decode_scratch_.get<char>(scratch), stream_);
      if (args.max_new > 1) prefill_attention(args, stream_);
    });
  }

  std::vector<ScoredToken> sample(const float* logits, uint32_t vocab, std::span<const SampleRow> rows) override {
    std::vector<SampleTask> tasks;
    std::vector<Adjustment> changes;
    for (const SampleRow& row : rows) {
      const std::vector<Adjustment> own = adjustments(row);
      const SamplingConfig& config = *row.config;
      tasks.push_back({.row = row.row,
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
    return run(const_cast<float*>(logits), vocab, tasks, changes);
  }

  std::vector<ScoredToken> score(const float* logits, uint32_t vocab, std::span<const ScoreRow> rows) override {
    std::vector<SampleTask> tasks;
    for (const ScoreRow& row : rows)
      tasks.push_back({.row = row.row,
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
    return run(const_cast<float*>(logits), vocab, tasks, {});
  }

 private:
  template <class F>
  void on_device(F launch) {
    const DeviceScope scope(device_.index);
    launch();
  }

  std::vector<ScoredToken> run(float* logits, uint32_t vocab, const std::vector<SampleTask>& tasks,
                               const std::vector<Adjustment>& changes) {
    if (tasks.empty()) return {};
    const DeviceScope scope(device_.index);
    uint32_t max_top = 0;
    for (const SampleTask& task : tasks) max_top = std::max(max_top, task.top);
    SampleTask* device_tasks = tasks_.get<SampleTask>(tasks.size());
    Adjustment* device_changes = changes_.get<Adjustment>(changes.size());
    SampleResult* device_results = results_.get<SampleResult>(tasks.size());
    TopEntry* device_tops = tops_.get<TopEntry>(tasks.size() * max_top);
    upload(device_tasks, tasks.data(), tasks.size() * sizeof(SampleTask));
    if (!changes.empty()) upload(device_changes, changes.data(), changes.size() * sizeof(Adjustment));
    cuda::sample(logits, vocab, device_tasks, static_cast<uint32_t>(tasks.size()), device_changes,
                 saved_.get<float>(changes.size()), device_results, device_tops, max_top, stream_);
    std::vector<SampleResult> results(tasks.size());
    std::vector<TopEntry> tops(tasks.size() * max_top);
    download(results.data(), device_results, results.size() * sizeof(SampleResult));
    if (!tops.empty()) download(tops.data(), device_tops, tops.size() * sizeof(TopEntry));

    std::vector<ScoredToken> out;
    for (size_t i = 0; i < tasks.size(); ++i) {
      if (!results[i].finite)
        throw std::runtime_error(
            "the model's logits are not finite; `gemma-cuda inspect --check` finds damaged weights");
      ScoredToken& token = out.emplace_back(ScoredToken{results[i].token, results[i].logit - results[i].log_mass, {}});
      const std::span<TopEntry> top(tops.data() + i * max_top, tasks[i].top);
      std::ranges::sort(top, [](const TopEntry& a, const TopEntry& b) {
        return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
      });
      for (const TopEntry& entry : top) token.top.push_back({entry.token, entry.logit - results[i].log_mass});
    }
    return out;
  }

  const DeviceInfo device_;
  cudaStream_t stream_ = nullptr;
  DeviceScratch gemm_workspace_, decode_scratch_;
  std::unique_ptr<Gemm> gemm_;
  Staging staging_;
  Tables tables_ring_;
  DeviceScratch tasks_, changes_, saved_, results_, tops_;
};

}  // namespace

std::unique_ptr<Backend> make_backend(int device) {
  require_usable(device);
  CublasLt::get();
  return std::make_unique<CudaBackend>(device);
}

std::string unsupported_head(uint32_t head_dim, uint32_t heads, uint32_t kv_heads) {
  if (!head_dim_supported(head_dim))
    return "head_dim " + std::to_string(head_dim) + " has no CUDA kernel; there are 16, 32, 64, 128 and 256";
  if (heads / kv_heads > kMaxGroup)
    return std::to_string(heads / kv_heads) + " query heads share a K/V head; CUDA kernels take up to " +
           std::to_string(kMaxGroup);
  return {};
}

}  // namespace gemma_cuda::cuda
