#include "core/device.h"

#include <charconv>
#include <optional>

#include "core/error.h"
#include "core/memory.h"
#ifdef GEMMA_CUDA_WITH_CUDA
#include "cuda/backend.h"
#endif

namespace gemma_cuda {
namespace {

// N of "cuda:N"; "cuda" alone is cuda:0.
std::optional<int> gpu_index(std::string_view device) {
  if (device == "cuda") return 0;
  if (!device.starts_with("cuda:")) return std::nullopt;
  int index = 0;
  const char* end = device.data() + device.size();
  const auto [stop, error] = std::from_chars(device.data() + 5, end, index);
  return error == std::errc() && stop == end && index >= 0 ? std::optional(index) : std::nullopt;
}

#ifdef GEMMA_CUDA_WITH_CUDA
std::string unsupported(const ModelSpec& spec, const EngineOptions& options) {
  if (options.compute != DType::bf16) return "the CUDA backend computes in bf16; f32 is for the reference backend";
  if (spec.hidden_size % 8 != 0 || spec.ffn_size % 8 != 0)
    return "hidden_size " + std::to_string(spec.hidden_size) + " and ffn_size " + std::to_string(spec.ffn_size) +
           " must be multiples of 8 on CUDA";
  if (uses_fp8(spec) && (spec.hidden_size % 16 != 0 || spec.ffn_size % 16 != 0))
    return "hidden_size " + std::to_string(spec.hidden_size) + " and ffn_size " + std::to_string(spec.ffn_size) +
           " must be multiples of 16 for FP8 on CUDA";
  if (spec.hidden_size > 8192) return "hidden_size " + std::to_string(spec.hidden_size) + " is more than CUDA's 8192";
  if (options.max_sequences > 1024)
    return "max_sequences " + std::to_string(options.max_sequences) + " is more than CUDA's 1024";
  for (const LayerSpec& layer : spec.layers)
    if (std::string why = cuda::unsupported_head(layer.head_dim, layer.heads, layer.kv_heads); !why.empty()) return why;
  return {};
}

std::unique_ptr<Backend> make_gpu_backend(int index, const ModelSpec& spec, const EngineOptions& options) {
  if (const std::string why = unsupported(spec, options); !why.empty()) throw Error::device(why);
  return cuda::make_backend(index, uses_fp8(spec));
}

// Whether "auto" would take the first GPU, as far as can be said without making it ready.
bool auto_takes_gpu(const ModelSpec& spec, const EngineOptions& options) {
  return options.device == "auto" && unsupported(spec, options).empty() && cuda::devices() > 0;
}
#else
std::unique_ptr<Backend> make_gpu_backend(int, const ModelSpec&, const EngineOptions& options) {
  throw Error::device("device " + options.device +
                      ": this build has only the reference backend; build with `--features cuda`");
}
#endif

}  // namespace

#ifdef GEMMA_CUDA_WITH_CUDA
bool has_cuda() { return true; }
uint32_t gpu_count() { return static_cast<uint32_t>(cuda::devices()); }
void require_gpu(uint32_t index, bool fp8) {
  if (index > INT32_MAX) throw Error::device("there is no device cuda:" + std::to_string(index));
  cuda::make_backend(static_cast<int>(index), fp8);
}
#else
bool has_cuda() { return false; }
uint32_t gpu_count() { return 0; }
void require_gpu(uint32_t index, bool) {
  throw Error::device("cuda:" + std::to_string(index) + ": this build has only the reference backend");
}
#endif

Device make_device(const ModelSpec& spec, const EngineOptions& options) {
  if (const std::optional<int> index = gpu_index(options.device)) return {make_gpu_backend(*index, spec, options), {}};
  if (options.device != "auto" && options.device != "reference")
    throw Error::invalid_argument("device '" + options.device + "' is not known; there are auto, reference and cuda:N");
  std::string why;
#ifdef GEMMA_CUDA_WITH_CUDA
  if (options.device == "auto") {
    try {
      return {make_gpu_backend(0, spec, options), {}};
    } catch (const Error& error) {
      why = error.message();
    }
  }
#endif
  return {make_reference_backend(options.threads, options.compute), why};
}

uint64_t workspace_bytes([[maybe_unused]] const ModelSpec& spec, [[maybe_unused]] const EngineOptions& options) {
#ifdef GEMMA_CUDA_WITH_CUDA
  const std::optional<int> index = gpu_index(options.device);
  if (index.has_value() || auto_takes_gpu(spec, options))
    return cuda::workspace_bytes(index.value_or(0), work_limits(spec, options));
#endif
  return 0;
}

}  // namespace gemma_cuda
