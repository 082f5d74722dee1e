#include "cuda/backend.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

#include "cuda/check.h"
#include "cuda/copy_bandwidth.h"
#include "cuda/decode_plans.h"
#include "cuda/gated_gemm.h"
#include "cuda/gemm.h"
#include "cuda/memory.h"
#include "cuda/ops.h"
#include "cuda/packed_bf16.h"
#include "cuda/pinned_ring.h"
#include "cuda/requirements.h"
#include "cuda/rope_gemm.h"
#include "cuda/sampler.h"
#include "cuda/side_stream.h"
#include "cuda/skinny_gemm.h"

namespace gemma_cuda::cuda {
namespace {

// Makes the device current for this thread, and the one before current again. It is set even if it is current already:
// in a new thread that is so by default, but only the call binds its context, which cuBLASLt looks for.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    GEMMA_CUDA_CHECK(cudaGetDevice(&before_));
    GEMMA_CUDA_CHECK(cudaSetDevice(device));
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

void require(const std::string& problem) {
  if (!problem.empty()) throw Error::device(problem);
}

void require_usable(int index) {
  int count = 0, driver = 0, runtime = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (outlives_the_call(status)) check(status, "cudaGetDeviceCount");
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  require(driver_problem(status, driver, runtime));
  require(index_problem(index, count));
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
  require(capability_problem(index, info.capability));
  return info;
}

struct Names {
  std::string kind;    // what GPUs that compute alike have in common
  std::string device;  // one line for a person
};

Names names(const DeviceInfo& device) {
  cudaDeviceProp properties;
  GEMMA_CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index));
  const std::string kind = std::string(properties.name) + ", sm_" + std::to_string(device.capability);
  char memory[40];
  std::snprintf(memory, sizeof memory, "%.1f GiB", static_cast<double>(properties.totalGlobalMem) / (1u << 30));
  return {kind, "cuda:" + std::to_string(device.index) + " (" + kind + ", " + memory + ")"};
}

uint64_t workspace_of(const DeviceInfo& device, const WorkLimits& limits) {
  return Gemm::kReservedBytes + PinnedRing::kPieceBytes +
         Sampler::reserved_bytes(limits.logit_rows, limits.vocab, device) +
         decode_scratch_bytes(device, limits.head_dim, limits.group) + decode_arrival_bytes(device) +
         DecodePlans::reserved_bytes(device);
}

// How many multiprocessors the attention of prompts gets for itself beside that of sequences with one new token. 0:
// they go one after the other. A step with a few prompts among many sequences, as the scheduler makes them, has some
// query tiles a head: alone they would leave most of the GPU idle, while the others are bound by memory and can spare
// some multiprocessors. `mixed` of gemma-7b in FP8 is 1.6 % faster for it; 1.9 % with a block a head, but then a prompt
// by itself, which takes the same captured step, would wait for its second tile.
int multiprocessors_beside(const AttentionArgs& args, const DeviceInfo& device) {
  constexpr uint32_t kLeastSequences = 32, kMostTokens = 256;
  if (device.capability != 90 || args.tiles == 0 || args.sequences < kLeastSequences || args.tokens > kMostTokens)
    return 0;
  return std::min<int>(2 * args.heads, device.multiprocessors / 4);
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
  explicit CudaBackend(const DeviceInfo& device) : device_(device), names_(names(device)) {
    const DeviceScope scope(device.index);
    gemm_ = std::make_unique<Gemm>(device_, names_.kind);
    GEMMA_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    beside_.open();
  }
  ~CudaBackend() override {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device_.index);
    cudaStreamSynchronize(stream_);
    gemm_.reset();
    cudaStreamDestroy(stream_);
    beside_.close();
    cudaSetDevice(before);
  }

  std::string name() const override { return names_.device; }

  std::optional<uint64_t> free_memory() const override {
    const DeviceScope scope(device_.index);
    size_t free = 0, total = 0;
    GEMMA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return free;
  }

  uint64_t workspace_bytes(const WorkLimits& limits) const override { return workspace_of(device_, limits); }
  void reserve(const WorkLimits& limits) override {
    const DeviceScope scope(device_.index);
    gemm_->reserve();
    ring_.reserve();
    sampler_.reserve(limits.logit_rows, limits.vocab, device_, stream_);
    decode_scratch_.get<char>(decode_scratch_bytes(device_, limits.head_dim, limits.group));
    decode_arrivals();
    decode_plans_.reserve(device_);
  }

  MemoryUse memory() const override {
    // Scratch memory only grows, so what there is now is the most there was.
    const uint64_t scratch = gemm_->device_bytes() + decode_scratch_.bytes() + decode_arrivals_.bytes() +
                             decode_plans_.bytes() + ring_.device_bytes() + sampler_.device_bytes();
    return {buffers_.now + scratch, buffers_.peak + scratch};
  }

  double copy_bandwidth() override {
    const DeviceScope scope(device_.index);
    return cuda::copy_bandwidth(stream_);
  }

  void* allocate(size_t bytes) override {
    const DeviceScope scope(device_.index);
    void* memory = allocate_device(bytes);
    // Rows that only fill up a batch are read before they are ever written; let them be numbers.
    GEMMA_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream_));
    buffers_.take(bytes);
    return memory;
  }
  void release(void* memory, size_t bytes) noexcept override {
    cudaFree(memory);  // waits for what uses it
    buffers_.give_back(bytes);
  }
  void upload(void* to, const void* host, size_t bytes) override {
    const DeviceScope scope(device_.index);
    ring_.upload(to, host, bytes, stream_);
  }
  void download(void* host, const void* from, size_t bytes) override {
    const DeviceScope scope(device_.index);
    GEMMA_CUDA_CHECK(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, stream_));
    GEMMA_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }
  void upload_as(void* to, DType to_type, const void* host, DType host_type, size_t count) override {
    const DeviceScope scope(device_.index);
    ring_.upload_as(to, to_type, host, host_type, count, stream_);
  }

  void fill_random(void* to, DType type, size_t count, uint64_t seed, float deviation) override {
    on_device([&] { cuda::fill_random(to, type, count, seed, deviation, stream_); });
  }

  uint64_t packed_bytes(const Matrix& w) const override {
    return skinny_gemm_reads_packed(w, device_) ? packed_bf16_bytes(w) : 0;
  }
  bool pack(const Matrix& w, void* to) override {
    const DeviceScope scope(device_.index);
    return pack_bf16(w, to, stream_);
  }

  bool captures() const override { return true; }
  void tune(bool on) override { gemm_->search(on); }
  bool asynchronous() const override { return true; }
  std::unique_ptr<Graph> capture(const std::function<void()>& work) override {
    const DeviceScope scope(device_.index);
    return std::make_unique<CapturedGraph>(device_.index, stream_, work);
  }

  void embed(const EmbedArgs& args) override {
    on_device([&] { cuda::embed(args, stream_); });
  }
  void gather_rows(const GatherArgs& args) override {
    on_device([&] { cuda::gather_rows(args, stream_); });
  }
  void norm(const NormArgs& args) override {
    on_device([&] { cuda::norm(args, stream()); });
  }
  void gemm(const GemmArgs& args) override {
    on_device([&] { gemm_->run(args, stream()); });
  }
  void gemm_norm(const GemmArgs& product, const NormArgs& args) override {
    on_device([&] {
      const Stream first = stream();
      if (const auto parts = gemm_->run_in_parts(product, first)) return cuda::norm(args, *parts, stream());
      gemm_->run(product, first);
      cuda::norm(args, stream());
    });
  }
  void rope(const RopeArgs& args) override {
    on_device([&] { cuda::rope(args, device_, stream()); });
  }
  void geglu(const GegluArgs& args) override {
    on_device([&] { cuda::geglu(args, stream()); });
  }
  bool fuses_gated_gemm(const GatedGemmArgs& args) const override {
    return skinny_gated_gemm_fits(args, device_) || gated_gemm_fits(args, device_);
  }
  void gated_gemm(const GatedGemmArgs& args) override {
    if (!fuses_gated_gemm(args)) return Backend::gated_gemm(args);
    on_device([&] {
      const Stream on = stream();
      if (!gemm_->run_gated(args, on)) cuda::gated_gemm(args, device_, on);
    });
  }
  void rope_gemm(const GemmArgs& product, const RopeArgs& rope) override {
    if (!rope_gemm_fits(product, rope, device_)) return Backend::rope_gemm(product, rope);
    on_device([&] { cuda::rope_gemm(product, rope, device_, stream()); });
  }
  void quantize(const QuantizeArgs& args) override {
    on_device([&] { cuda::quantize(args, stream()); });
  }
  void observe(const ObserveArgs& args) override {
    on_device([&] { cuda::observe(args, stream()); });
  }
  void observe_cache(const ObserveCacheArgs& args) override {
    on_device([&] { cuda::observe_cache(args, stream()); });
  }
  void soft_cap(const SoftCapArgs& args) override {
    on_device([&] { cuda::soft_cap(args, stream()); });
  }
  void attention(const AttentionArgs& args) override {
    on_device([&] {
      if (const int beside = multiprocessors_beside(args, device_); beside > 0) {
        const Stream prompts = beside_.fork(stream_);
        prefill_attention(args, part(beside), prompts);
        decode(args, part(device_.multiprocessors - beside));
        beside_.join(stream_);
        joined_ = true;
        return;
      }
      decode(args, device_);
      if (args.tiles > 0) prefill_attention(args, device_, stream());
    });
  }

  void sampled_gemm(const GemmArgs& product, float soft_cap, const SampleArgs& args) override {
    if (!skinny_surveyed_gemm_fits(product, device_)) return Backend::sampled_gemm(product, soft_cap, args);
    on_device([&] {
      Survey* room = sampler_.surveys(skinny_surveys(product.tokens, device_));
      surveys_ = gemm_->run_surveyed(product, soft_cap, args, room, stream());
      sampler_.sample(args, *surveys_, stream());
    });
  }
  void sample(const SampleArgs& args) override {
    const bool surveyed = surveys_ && args.product_rows > 0 && args.product_rows <= kSkinnyTokens;
    on_device([&] { surveyed ? sampler_.sample(args, *surveys_, stream()) : sampler_.sample(args, stream()); });
  }
  void start_results(uint32_t count, uint32_t max_top) override {
    on_device([&] { sampler_.start_results(count, max_top, stream_); });
  }
  std::vector<std::optional<ScoredToken>> finish_results() override {
    const DeviceScope scope(device_.index);
    return sampler_.finish_results();
  }

 private:
  uint32_t* decode_arrivals() {
    const size_t bytes = decode_arrival_bytes(device_);
    if (decode_arrivals_.bytes() == 0) GEMMA_CUDA_CHECK(cudaMemset(decode_arrivals_.get<char>(bytes), 0, bytes));
    return decode_arrivals_.get<uint32_t>(0);
  }
  void decode(const AttentionArgs& args, const DeviceInfo& device) {
    const size_t scratch = decode_scratch_bytes(device_, args.cache.head_dim, args.heads / args.cache.kv_heads);
    Stream on = stream();
    const DecodePlans::Found found = decode_plans_.get(args, device_, device, on);
    if (found.made) on.overlaps = false;
    decode_attention(args, device, found.plan, decode_scratch_.get<char>(scratch), decode_arrivals(), on);
  }
  DeviceInfo part(int multiprocessors) const {
    DeviceInfo info = device_;
    info.multiprocessors = multiprocessors;
    return info;
  }
  // For one launch. The first one behind a join waits for two kernels, of which it could overlap with one only.
  Stream stream() { return {stream_, device_.capability >= 90 && !std::exchange(joined_, false)}; }

  template <class F>
  void on_device(F launch) {
    const DeviceScope scope(device_.index);
    launch();
  }

  const DeviceInfo device_;
  const Names names_;
  cudaStream_t stream_ = nullptr;
  SideStream beside_;
  bool joined_ = false;
  DeviceScratch decode_scratch_, decode_arrivals_;
  DecodePlans decode_plans_;
  MemoryUse buffers_;
  std::unique_ptr<Gemm> gemm_;
  PinnedRing ring_;
  Sampler sampler_;
  std::optional<Surveys> surveys_;  // as products of up to kSkinnyTokens rows of logits leave them, run or recorded
};

}  // namespace

std::unique_ptr<Backend> make_backend(int device, bool fp8) {
  require_usable(device);
  const DeviceInfo info = device_info(device);
  require(fp8 ? fp8_problem(device, info.capability) : "");
  CublasLt::get();
  return std::make_unique<CudaBackend>(info);
}

int devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : (cudaGetLastError(), 0);
}

uint64_t workspace_bytes(int device, const WorkLimits& limits) {
  DeviceInfo info;
  info.multiprocessors = 132;
  if (device < devices())
    GEMMA_CUDA_CHECK(cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return workspace_of(info, limits);
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
