// The C API's side of the core: its types turned into the core's and back, exceptions into codes. Nothing is decided
// here.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "config/config.h"
#include "core/device.h"
#include "core/engine.h"
#include "core/error.h"
#include "gemma_cuda.h"
#include "ops/backend.h"

#ifndef GEMMA_CUDA_VERSION
#define GEMMA_CUDA_VERSION "0.0.0"
#endif

using namespace gemma_cuda;

static_assert(GEMMA_CUDA_MAGNITUDE_BINS == kMagnitudeBins);

namespace {

// Seconds spent in calls of a kind.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {}
  ~Stopwatch() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// An item's results in the form they are handed out in: `tokens` holds what was sampled, then what was scored.
struct Output {
  ItemOutput item;
  std::vector<std::vector<gemma_cuda_logprob>> tops;
  std::vector<gemma_cuda_token> tokens;

  explicit Output(ItemOutput from) : item(std::move(from)) {
    const auto add = [&](const ScoredToken& token) {
      std::vector<gemma_cuda_logprob>& top = tops.emplace_back();
      for (const TokenLogprob& likely : token.top) top.push_back({likely.token, likely.logprob});
      tokens.push_back({token.token, token.logprob, top.data(), top.size()});
    };
    tops.reserve(item.sampled.size() + item.scored.size());
    for (const ScoredToken& token : item.sampled) add(token);
    for (const ScoredToken& token : item.scored) add(token);
  }
};

}  // namespace

struct gemma_cuda_model {
  ModelSpec spec;
  std::vector<TensorSlot> tensors;  // as they are handed out
};

struct gemma_cuda_engine {
  gemma_cuda_engine(const ModelSpec& spec, const EngineOptions& options, gemma_cuda_log log, void* log_user)
      : engine(spec, options), device(engine.device_name()), log(log), log_user(log_user) {}

  void say(int32_t level, const std::string& text) const {
    if (log != nullptr) log(log_user, level, text.c_str());
  }

  Engine engine;
  const std::string device;
  const gemma_cuda_log log;
  void* const log_user;
  std::vector<Output> outputs;
  std::vector<Observation> observations;
  double load_seconds = 0, launch_seconds = 0, collect_seconds = 0;
  mutable std::string error;
};

namespace {

thread_local std::string last_error;  // of calls that have no engine

void require(bool ok, const std::string& what) {
  if (!ok) throw Error::invalid_argument(what);
}

template <class T>
T& given(T* pointer, const char* name) {
  if (pointer == nullptr) throw Error::invalid_argument(std::string(name) + " is NULL");
  return *pointer;
}

template <class T>
std::span<const T> list(const T* data, size_t count, const char* name) {
  if (data == nullptr && count > 0) throw Error::invalid_argument(std::string(name) + " is NULL");
  return {data, count};
}

gemma_cuda_status code_of(Error::Kind kind) {
  switch (kind) {
    case Error::Kind::invalid_argument: return GEMMA_CUDA_INVALID_ARGUMENT;
    case Error::Kind::out_of_pages: return GEMMA_CUDA_OUT_OF_PAGES;
    case Error::Kind::device: return GEMMA_CUDA_DEVICE_FAILED;
  }
  return GEMMA_CUDA_INTERNAL;
}

// Runs `call`; what it throws becomes a code, and a sentence in `error`.
template <class F>
gemma_cuda_status guarded(std::string& error, F call) noexcept {
  const auto failed = [&error](gemma_cuda_status code, const char* what) {
    try {
      error = what;
    } catch (...) {
      error.clear();  // no room for the sentence; the code is told
    }
    return code;
  };
  try {
    call();
    return GEMMA_CUDA_OK;
  } catch (const Error& thrown) {
    return failed(code_of(thrown.kind()), thrown.message());
  } catch (const std::bad_alloc&) {
    return failed(GEMMA_CUDA_OUT_OF_MEMORY, "the host has no memory left");
  } catch (const std::exception& thrown) {
    return failed(GEMMA_CUDA_INTERNAL, thrown.what());
  } catch (...) {
    return failed(GEMMA_CUDA_INTERNAL, "something that is no exception was thrown");
  }
}
template <class F>
gemma_cuda_status guarded(F call) noexcept {
  return guarded(last_error, call);
}
// For an engine, which may be missing.
template <class E, class F>
gemma_cuda_status with_engine(E* engine, F call) noexcept {
  if (engine == nullptr) return guarded([] { throw Error::invalid_argument("engine is NULL"); });
  return guarded(engine->error, [&] { call(*engine); });
}

// A host's struct as the library has it, with defaults behind where the host's ends.
template <class T>
T read(const T* from, void (*init)(T*), const char* name) {
  const uint32_t size = given(from, name).size;
  require(size >= sizeof(uint32_t), std::string(name) + "->size is not set; call its _init function first");
  const char* bytes = reinterpret_cast<const char*>(from);
  for (size_t i = sizeof(T); i < size; ++i)
    require(bytes[i] == 0, std::string(name) + " has members that this library, " GEMMA_CUDA_VERSION
                                               ", does not know; it is older than the header");
  T out;
  init(&out);
  std::memcpy(&out, from, std::min<size_t>(size, sizeof(T)));
  out.size = sizeof(T);
  return out;
}
// As much of it as the host knows.
template <class T>
void write(T* to, T value, const char* name) {
  const uint32_t size = given(to, name).size;
  require(size >= sizeof(uint32_t), std::string(name) + "->size is not set; call its _init function first");
  value.size = size;
  std::memcpy(to, &value, std::min<size_t>(size, sizeof(T)));
}
// The defaults of a struct without pointers or numbers other than zero.
template <class T>
void clear(T* value) {
  if (value == nullptr) return;
  *value = T{};
  value->size = sizeof(T);
}

DType dtype(gemma_cuda_dtype type) {
  switch (type) {
    case GEMMA_CUDA_F32: return DType::f32;
    case GEMMA_CUDA_BF16: return DType::bf16;
    case GEMMA_CUDA_F16: return DType::f16;
    case GEMMA_CUDA_E4M3: return DType::e4m3;
    default: throw Error::invalid_argument("there is no dtype " + std::to_string(type));
  }
}

Scheme scheme(gemma_cuda_scheme which) {
  switch (which) {
    case GEMMA_CUDA_PLAIN: return Scheme::plain;
    case GEMMA_CUDA_FP8_STATIC: return Scheme::fp8_static;
    case GEMMA_CUDA_FP8_DYNAMIC: return Scheme::fp8_dynamic;
    default: throw Error::invalid_argument("there is no scheme " + std::to_string(which));
  }
}

EngineOptions options_of(const gemma_cuda_options& from) {
  return {.device = &given(from.device, "options->device"),
          .compute = dtype(from.compute),
          .weights = dtype(from.weights),
          .page_size = from.page_size,
          .pages = from.pages,
          .max_batch_tokens = from.max_batch_tokens,
          .max_sequences = from.max_sequences,
          .max_logit_rows = from.max_logit_rows,
          .threads = from.threads,
          .graphs = from.graphs != 0,
          .prefix_cache = from.prefix_cache != 0};
}

SamplingConfig sampling_of(const gemma_cuda_sampling* given_sampling) {
  if (given_sampling == nullptr) return {};
  const gemma_cuda_sampling from = read(given_sampling, gemma_cuda_sampling_init, "sampling");
  const auto at_least = [](float value, float least, const char* name) {
    require(value >= least,
            std::string("sampling->") + name + " is " + std::to_string(value) + ", below " + std::to_string(least));
  };
  at_least(from.temperature, 0, "temperature");
  at_least(from.top_p, 0, "top_p");
  at_least(from.min_p, 0, "min_p");
  require(from.repetition_penalty > 0, "sampling->repetition_penalty is not above 0");
  SamplingConfig out{.temperature = from.temperature,
                     .top_k = from.top_k,
                     .top_p = from.top_p,
                     .min_p = from.min_p,
                     .repetition_penalty = from.repetition_penalty,
                     .presence_penalty = from.presence_penalty,
                     .frequency_penalty = from.frequency_penalty,
                     .seed = from.seed,
                     .logit_bias = {},
                     .stop_tokens = {},
                     .min_new_tokens = from.min_new_tokens,
                     .top_logprobs = from.top_logprobs};
  for (const gemma_cuda_bias& bias : list(from.logit_bias, from.logit_bias_count, "sampling->logit_bias"))
    out.logit_bias.push_back({bias.token, bias.bias});
  const auto stops = list(from.stop_tokens, from.stop_token_count, "sampling->stop_tokens");
  out.stop_tokens.assign(stops.begin(), stops.end());
  return out;
}

uint32_t count_of(size_t count, const char* name) {
  require(count <= UINT32_MAX, std::string(name) + " is too large");
  return static_cast<uint32_t>(count);
}

std::vector<StepItem> items_of(const gemma_cuda_item* from, size_t count) {
  constexpr uint32_t kKnown = GEMMA_CUDA_SAMPLE | GEMMA_CUDA_SCORE | GEMMA_CUDA_LOGITS | GEMMA_CUDA_HIDDEN;
  std::vector<StepItem> out;
  for (const gemma_cuda_item& item : list(from, count, "items")) {
    require((item.flags & ~kKnown) == 0, "sequence " + std::to_string(item.sequence) + " has flags that are not known");
    out.push_back({.sequence = item.sequence,
                   .tokens = item.tokens,
                   .sample = (item.flags & GEMMA_CUDA_SAMPLE) != 0,
                   .score = (item.flags & GEMMA_CUDA_SCORE) != 0,
                   .logits = (item.flags & GEMMA_CUDA_LOGITS) != 0,
                   .hidden = (item.flags & GEMMA_CUDA_HIDDEN) != 0});
  }
  return out;
}

void launch(gemma_cuda_engine& engine, const gemma_cuda_item* items, size_t count) {
  const std::vector<StepItem> all = items_of(items, count);
  const Stopwatch watch(engine.launch_seconds);
  engine.engine.launch(all);
}

void collect(gemma_cuda_engine& engine) {
  const Stopwatch watch(engine.collect_seconds);
  std::vector<Output> outputs;
  for (ItemOutput& item : engine.engine.collect()) outputs.emplace_back(std::move(item));
  engine.outputs = std::move(outputs);
}

gemma_cuda_memory memory_of(const MemoryBudget& budget) {
  gemma_cuda_memory out;
  gemma_cuda_memory_init(&out);
  out.weights = budget.weights;
  out.kv_cache = budget.kv_cache;
  out.activations = budget.activations;
  out.logits = budget.logits;
  out.workspace = budget.workspace;
  out.total = budget.total();
  return out;
}

std::string mebibytes(uint64_t bytes) { return std::to_string((bytes + (1 << 19)) >> 20) + " MiB"; }

}  // namespace

uint32_t gemma_cuda_abi(void) { return GEMMA_CUDA_ABI; }
const char* gemma_cuda_version(void) { return GEMMA_CUDA_VERSION; }
uint32_t gemma_cuda_has_cuda(void) { return has_cuda() ? 1 : 0; }
uint32_t gemma_cuda_gpu_count(void) {
  uint32_t count = 0;
  guarded([&] { count = gpu_count(); });
  return count;
}
gemma_cuda_status gemma_cuda_check_gpu(uint32_t index, uint32_t fp8) {
  return guarded([&] { require_gpu(index, fp8 != 0); });
}
const char* gemma_cuda_last_error(const gemma_cuda_engine* engine) {
  return engine != nullptr ? engine->error.c_str() : last_error.c_str();
}

gemma_cuda_status gemma_cuda_model_parse(const char* json, size_t bytes, gemma_cuda_model** model) {
  return guarded([&] {
    given(model, "model");
    const std::span<const char> text = list(json, bytes, "json");
    ModelConfig config = parse_config({text.data(), text.size()});
    std::vector<TensorSlot> tensors = tensor_table(config.spec);
    *model = new gemma_cuda_model{std::move(config.spec), std::move(tensors)};
  });
}
void gemma_cuda_model_free(gemma_cuda_model* model) { delete model; }

void gemma_cuda_model_info_init(gemma_cuda_model_info* info) { clear(info); }
gemma_cuda_status gemma_cuda_model_get_info(const gemma_cuda_model* model, gemma_cuda_model_info* info) {
  return guarded([&] {
    const gemma_cuda_model& from = given(model, "model");
    gemma_cuda_model_info out;
    gemma_cuda_model_info_init(&out);
    out.vocab_size = from.spec.vocab_size;
    out.hidden_size = from.spec.hidden_size;
    out.layers = static_cast<uint32_t>(from.spec.layers.size());
    out.max_positions = from.spec.max_positions;
    out.tensors = static_cast<uint32_t>(from.tensors.size());
    write(info, out, "info");
  });
}
gemma_cuda_status gemma_cuda_model_tensor(const gemma_cuda_model* model, uint32_t index, const char** name,
                                          const uint64_t** shape, uint32_t* rank) {
  return guarded([&] {
    const std::vector<TensorSlot>& tensors = given(model, "model").tensors;
    require(index < tensors.size(),
            "there is no tensor " + std::to_string(index) + " of " + std::to_string(tensors.size()));
    given(name, "name") = tensors[index].name.c_str();
    given(shape, "shape") = tensors[index].shape.data();
    given(rank, "rank") = static_cast<uint32_t>(tensors[index].shape.size());
  });
}

void gemma_cuda_quantization_init(gemma_cuda_quantization* quantization) { clear(quantization); }
gemma_cuda_status gemma_cuda_model_quantize(gemma_cuda_model* model, const gemma_cuda_quantization* quantization) {
  return guarded([&] {
    gemma_cuda_model& own = given(model, "model");
    const gemma_cuda_quantization from = read(quantization, gemma_cuda_quantization_init, "quantization");
    ModelSpec spec = own.spec;
    spec.lm_head = scheme(from.lm_head);
    for (LayerSpec& layer : spec.layers) {
      layer.qkv = layer.attention_out = layer.gate_up = layer.down = scheme(from.matrices);
      layer.fp8_cache = from.fp8_cache != 0;
    }
    for (uint32_t index : list(from.plain_layers, from.plain_layer_count, "quantization->plain_layers")) {
      require(index < spec.layers.size(), "there is no layer " + std::to_string(index));
      LayerSpec& layer = spec.layers[index];
      layer.qkv = layer.attention_out = layer.gate_up = layer.down = Scheme::plain;
    }
    std::vector<TensorSlot> tensors = tensor_table(spec);
    own = {std::move(spec), std::move(tensors)};
  });
}

void gemma_cuda_options_init(gemma_cuda_options* options) {
  if (options == nullptr) return;
  clear(options);
  const EngineOptions defaults;
  options->compute = options->weights = GEMMA_CUDA_BF16;
  options->page_size = defaults.page_size;
  options->pages = defaults.pages;
  options->max_batch_tokens = defaults.max_batch_tokens;
  options->max_sequences = defaults.max_sequences;
  options->max_logit_rows = defaults.max_logit_rows;
  options->graphs = options->prefix_cache = 1;
  options->device = "auto";
}

void gemma_cuda_memory_init(gemma_cuda_memory* memory) { clear(memory); }
gemma_cuda_status gemma_cuda_memory_budget(const gemma_cuda_model* model, const gemma_cuda_options* options,
                                           gemma_cuda_memory* memory) {
  return guarded([&] {
    const gemma_cuda_options from = read(options, gemma_cuda_options_init, "options");
    write(memory, memory_of(memory_budget(given(model, "model").spec, options_of(from))), "memory");
  });
}

gemma_cuda_status gemma_cuda_engine_create(const gemma_cuda_model* model, const gemma_cuda_options* options,
                                           gemma_cuda_engine** engine) {
  return guarded([&] {
    given(engine, "engine");
    const gemma_cuda_options from = read(options, gemma_cuda_options_init, "options");
    const EngineOptions own = options_of(from);
    const ModelSpec& spec = given(model, "model").spec;
    auto made = std::make_unique<gemma_cuda_engine>(spec, own, from.log, from.log_user);
    const MemoryBudget budget = memory_budget(spec, own);
    made->say(0, "memory: " + mebibytes(budget.total()) + ": weights " + mebibytes(budget.weights) + ", KV cache " +
                     mebibytes(budget.kv_cache) + ", activations " + mebibytes(budget.activations) + ", logits " +
                     mebibytes(budget.logits) + ", workspace " + mebibytes(budget.workspace));
    made->say(0, "device: " + made->device);
    *engine = made.release();
  });
}
void gemma_cuda_engine_destroy(gemma_cuda_engine* engine) { delete engine; }
const char* gemma_cuda_engine_device(const gemma_cuda_engine* engine) {
  return engine != nullptr ? engine->device.c_str() : "";
}

gemma_cuda_status gemma_cuda_load_tensor(gemma_cuda_engine* engine, const char* name, gemma_cuda_dtype type,
                                         const uint64_t* shape, uint32_t rank, const void* data, size_t bytes) {
  return with_engine(engine, [&](gemma_cuda_engine& e) {
    const Stopwatch watch(e.load_seconds);
    const std::optional<std::string> canonical = canonical_tensor_name(&given(name, "name"));
    require(canonical.has_value(), "tensor " + std::string(name) + " is not one of the text model's");
    e.engine.load_tensor(*canonical, dtype(type), list(shape, rank, "shape"),
                         list(static_cast<const uint8_t*>(data), bytes, "data"));
  });
}
gemma_cuda_status gemma_cuda_load_random(gemma_cuda_engine* engine, uint64_t seed) {
  return with_engine(engine, [&](gemma_cuda_engine& e) {
    const Stopwatch watch(e.load_seconds);
    e.engine.load_random(seed);
  });
}
gemma_cuda_status gemma_cuda_finish_loading(gemma_cuda_engine* engine) {
  return with_engine(engine, [&](gemma_cuda_engine& e) {
    {
      const Stopwatch watch(e.load_seconds);
      e.engine.finish_loading();
    }
    e.say(0, "loaded in " + std::to_string(e.load_seconds) + " s");
  });
}

void gemma_cuda_sampling_init(gemma_cuda_sampling* sampling) {
  if (sampling == nullptr) return;
  clear(sampling);
  sampling->top_p = 1;
  sampling->repetition_penalty = 1;
}

gemma_cuda_status gemma_cuda_add_sequence(gemma_cuda_engine* engine, const uint32_t* tokens, size_t count,
                                          size_t prompt_count, const gemma_cuda_sampling* sampling,
                                          uint32_t reuse_prefix, uint32_t* sequence) {
  return with_engine(engine, [&](gemma_cuda_engine& e) {
    given(sequence, "sequence");
    *sequence = e.engine.add_sequence(list(tokens, count, "tokens"), count_of(prompt_count, "prompt_count"),
                                      sampling_of(sampling), reuse_prefix != 0);
  });
}
gemma_cuda_status gemma_cuda_extend_sequence(gemma_cuda_engine* engine, uint32_t sequence, const uint32_t* tokens,
                                             size_t count) {
  return with_engine(engine,
                     [&](gemma_cuda_engine& e) { e.engine.append_tokens(sequence, list(tokens, count, "tokens")); });
}
gemma_cuda_status gemma_cuda_fork_sequence(gemma_cuda_engine* engine, uint32_t sequence,
                                           const gemma_cuda_sampling* sampling, uint32_t* fork) {
  return with_engine(engine, [&](gemma_cuda_engine& e) {
    given(fork, "fork");
    *fork = e.engine.fork_sequence(sequence, sampling_of(sampling));
  });
}
gemma_cuda_status gemma_cuda_remove_sequence(gemma_cuda_engine* engine, uint32_t sequence) {
  return with_engine(engine, [&](gemma_cuda_engine& e) { e.engine.remove_sequence(sequence); });
}
gemma_cuda_status gemma_cuda_sequence_state(const gemma_cuda_engine* engine, uint32_t sequence, uint32_t* tokens,
                                            uint32_t* cached) {
  return with_engine(engine, [&](const gemma_cuda_engine& e) {
    given(tokens, "tokens"), given(cached, "cached");
    const SequenceState state = e.engine.sequence_state(sequence);
    *tokens = state.tokens;
    *cached = state.cached;
  });
}
gemma_cuda_status gemma_cuda_free_pages(const gemma_cuda_engine* engine, uint32_t* pages) {
  return with_engine(engine, [&](const gemma_cuda_engine& e) { given(pages, "pages") = e.engine.free_pages(); });
}
gemma_cuda_status gemma_cuda_pages_for(const gemma_cuda_engine* engine, uint32_t sequence, uint32_t tokens,
                                       uint32_t* pages) {
  return with_engine(engine,
                     [&](const gemma_cuda_engine& e) { given(pages, "pages") = e.engine.pages_for(sequence, tokens); });
}

gemma_cuda_status gemma_cuda_step(gemma_cuda_engine* engine, const gemma_cuda_item* items, size_t count) {
  return with_engine(engine, [&](gemma_cuda_engine& e) {
    require(e.engine.launched() == 0, "a launched step is not collected yet");
    launch(e, items, count);
    collect(e);
  });
}
gemma_cuda_status gemma_cuda_launch(gemma_cuda_engine* engine, const gemma_cuda_item* items, size_t count) {
  return with_engine(engine, [&](gemma_cuda_engine& e) { launch(e, items, count); });
}
gemma_cuda_status gemma_cuda_collect(gemma_cuda_engine* engine) {
  return with_engine(engine, [&](gemma_cuda_engine& e) { collect(e); });
}

void gemma_cuda_output_init(gemma_cuda_output* output) { clear(output); }
gemma_cuda_status gemma_cuda_get_output(const gemma_cuda_engine* engine, size_t index, gemma_cuda_output* output) {
  return with_engine(engine, [&](const gemma_cuda_engine& e) {
    require(index < e.outputs.size(),
            "there is no output " + std::to_string(index) + "; the last step had " + std::to_string(e.outputs.size()));
    const Output& from = e.outputs[index];
    const size_t sampled = from.item.sampled.size();
    const auto data = [](const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); };
    gemma_cuda_output out;
    gemma_cuda_output_init(&out);
    out.sequence = from.item.sequence;
    out.sampled = sampled > 0 ? from.tokens.data() : nullptr;
    out.scored = from.tokens.data() + sampled;
    out.scored_count = from.item.scored.size();
    out.logits = data(from.item.logits);
    out.logit_count = from.item.logits.size();
    out.hidden = data(from.item.hidden);
    out.hidden_count = from.item.hidden.size();
    out.failure = from.item.failure.empty() ? nullptr : from.item.failure.c_str();
    write(output, out, "output");
  });
}

gemma_cuda_status gemma_cuda_start_calibration(gemma_cuda_engine* engine) {
  return with_engine(engine, [](gemma_cuda_engine& e) { e.engine.start_calibration(); });
}
gemma_cuda_status gemma_cuda_stop_calibration(gemma_cuda_engine* engine) {
  return with_engine(engine, [](gemma_cuda_engine& e) { e.engine.stop_calibration(); });
}
void gemma_cuda_observation_init(gemma_cuda_observation* observation) { clear(observation); }
gemma_cuda_status gemma_cuda_read_calibration(gemma_cuda_engine* engine, size_t* count) {
  return with_engine(engine, [&](gemma_cuda_engine& e) {
    given(count, "count");
    e.observations = e.engine.calibration();
    *count = e.observations.size();
  });
}
gemma_cuda_status gemma_cuda_get_observation(const gemma_cuda_engine* engine, size_t index,
                                             gemma_cuda_observation* observation) {
  return with_engine(engine, [&](const gemma_cuda_engine& e) {
    require(index < e.observations.size(), "there is no observation " + std::to_string(index) + "; there were " +
                                               std::to_string(e.observations.size()) + " read");
    const Observation& from = e.observations[index];
    gemma_cuda_observation out;
    gemma_cuda_observation_init(&out);
    out.groups = static_cast<uint32_t>(from.largest.size());
    out.name = from.name.c_str();
    out.amax = from.largest.data();
    out.counts = from.counts.data();
    write(observation, out, "observation");
  });
}

void gemma_cuda_statistics_init(gemma_cuda_statistics* statistics) { clear(statistics); }
gemma_cuda_status gemma_cuda_get_statistics(const gemma_cuda_engine* engine, gemma_cuda_statistics* statistics) {
  return with_engine(engine, [&](const gemma_cuda_engine& e) {
    const EngineStatistics from = e.engine.statistics();
    gemma_cuda_statistics out;
    gemma_cuda_statistics_init(&out);
    out.steps = from.steps;
    out.captured_steps = from.captured_steps;
    out.tokens = from.tokens;
    out.bytes_read = from.bytes_read;
    out.flops = from.flops;
    out.memory = from.memory;
    out.peak_memory = from.peak_memory;
    out.load_seconds = e.load_seconds;
    out.launch_seconds = e.launch_seconds;
    out.collect_seconds = e.collect_seconds;
    write(statistics, out, "statistics");
  });
}
