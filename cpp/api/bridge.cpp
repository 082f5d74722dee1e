#include "api/bridge.h"

#include <span>
#include <string>
#include <string_view>

#include "config/config.h"
#include "core/error.h"
#include "core/quantize.h"
#include "gemma-cuda/src/bridge.rs.h"

namespace gemma_cuda::bridge {
namespace {

std::string_view view(rust::Str text) { return {text.data(), text.size()}; }

template <class T>
std::span<const T> view(rust::Slice<const T> slice) {
  return {slice.data(), slice.size()};
}

gemma_cuda::DType from_rust(DType type) {
  switch (type) {
    case DType::F32: return gemma_cuda::DType::f32;
    case DType::BF16: return gemma_cuda::DType::bf16;
    case DType::F16: return gemma_cuda::DType::f16;
    case DType::E4M3: return gemma_cuda::DType::e4m3;
  }
  throw Error::invalid_argument("unknown dtype");
}

gemma_cuda::Scheme from_rust(Scheme scheme) {
  switch (scheme) {
    case Scheme::Plain: return gemma_cuda::Scheme::plain;
    case Scheme::Fp8Static: return gemma_cuda::Scheme::fp8_static;
    case Scheme::Fp8Dynamic: return gemma_cuda::Scheme::fp8_dynamic;
    case Scheme::Fp8Cast: return gemma_cuda::Scheme::fp8_cast;
  }
  throw Error::invalid_argument("unknown scheme");
}

gemma_cuda::ModelSpec from_rust(const ModelSpec& spec) {
  gemma_cuda::ModelSpec out{
      .vocab_size = spec.vocab_size,
      .hidden_size = spec.hidden_size,
      .ffn_size = spec.ffn_size,
      .max_positions = spec.max_positions,
      .rms_norm_eps = spec.rms_norm_eps,
      .final_soft_cap = spec.final_soft_cap,
      .tied_embeddings = spec.tied_embeddings,
      .lm_head = from_rust(spec.lm_head),
      .layers = {},
  };
  for (const LayerSpec& layer : spec.layers)
    out.layers.push_back({
        .window = layer.window,
        .rope_theta = layer.rope_theta,
        .rope_factor = layer.rope_factor,
        .heads = layer.heads,
        .kv_heads = layer.kv_heads,
        .head_dim = layer.head_dim,
        .attention_scale = layer.attention_scale,
        .attention_soft_cap = layer.attention_soft_cap,
        .post_norms = layer.post_norms,
        .qk_norm = layer.qk_norm,
        .qkv = from_rust(layer.qkv),
        .attention_out = from_rust(layer.attention_out),
        .gate_up = from_rust(layer.gate_up),
        .down = from_rust(layer.down),
        .fp8_cache = layer.fp8_cache,
    });
  return out;
}

Scheme to_rust(gemma_cuda::Scheme scheme) {
  switch (scheme) {
    case gemma_cuda::Scheme::plain: return Scheme::Plain;
    case gemma_cuda::Scheme::fp8_static: return Scheme::Fp8Static;
    case gemma_cuda::Scheme::fp8_dynamic: return Scheme::Fp8Dynamic;
    case gemma_cuda::Scheme::fp8_cast: return Scheme::Fp8Cast;
  }
  throw Error::invalid_argument("unknown scheme");
}

ModelSpec to_rust(const gemma_cuda::ModelSpec& spec) {
  ModelSpec out{
      .vocab_size = spec.vocab_size,
      .hidden_size = spec.hidden_size,
      .ffn_size = spec.ffn_size,
      .max_positions = spec.max_positions,
      .rms_norm_eps = spec.rms_norm_eps,
      .final_soft_cap = spec.final_soft_cap,
      .tied_embeddings = spec.tied_embeddings,
      .lm_head = to_rust(spec.lm_head),
      .layers = {},
  };
  for (const gemma_cuda::LayerSpec& layer : spec.layers)
    out.layers.push_back({
        .window = layer.window,
        .rope_theta = layer.rope_theta,
        .rope_factor = layer.rope_factor,
        .heads = layer.heads,
        .kv_heads = layer.kv_heads,
        .head_dim = layer.head_dim,
        .attention_scale = layer.attention_scale,
        .attention_soft_cap = layer.attention_soft_cap,
        .post_norms = layer.post_norms,
        .qk_norm = layer.qk_norm,
        .qkv = to_rust(layer.qkv),
        .attention_out = to_rust(layer.attention_out),
        .gate_up = to_rust(layer.gate_up),
        .down = to_rust(layer.down),
        .fp8_cache = layer.fp8_cache,
    });
  return out;
}

gemma_cuda::EngineOptions from_rust(const EngineOptions& options) {
  return {
      .device = std::string(options.device),
      .compute = from_rust(options.compute),
      .weights = from_rust(options.weights),
      .page_size = options.page_size,
      .pages = options.pages,
      .max_batch_tokens = options.max_batch_tokens,
      .max_sequences = options.max_sequences,
      .max_logit_rows = options.max_logit_rows,
      .threads = options.threads,
      .graphs = options.graphs,
      .prefix_cache = options.prefix_cache,
      .padded = options.padded,
  };
}

gemma_cuda::SamplingConfig from_rust(const SamplingConfig& config) {
  gemma_cuda::SamplingConfig out{
      .temperature = config.temperature,
      .top_k = config.top_k,
      .top_p = config.top_p,
      .min_p = config.min_p,
      .repetition_penalty = config.repetition_penalty,
      .presence_penalty = config.presence_penalty,
      .frequency_penalty = config.frequency_penalty,
      .seed = config.seed,
      .logit_bias = {},
      .stop_tokens = {config.stop_tokens.begin(), config.stop_tokens.end()},
      .min_new_tokens = config.min_new_tokens,
      .top_logprobs = config.top_logprobs,
  };
  for (const TokenBias& bias : config.logit_bias) out.logit_bias.push_back({bias.token, bias.bias});
  return out;
}

rust::Vec<ScoredToken> to_rust(const std::vector<gemma_cuda::ScoredToken>& tokens) {
  rust::Vec<ScoredToken> out;
  out.reserve(tokens.size());
  for (const gemma_cuda::ScoredToken& token : tokens) {
    ScoredToken scored{token.token, token.logprob, {}};
    for (const gemma_cuda::TokenLogprob& top : token.top) scored.top.push_back({top.token, top.logprob});
    out.push_back(std::move(scored));
  }
  return out;
}

rust::Vec<float> to_rust(const std::vector<float>& values) {
  rust::Vec<float> out;
  out.reserve(values.size());
  for (float value : values) out.push_back(value);
  return out;
}

std::vector<gemma_cuda::StepItem> from_rust(rust::Slice<const StepItem> items) {
  std::vector<gemma_cuda::StepItem> out;
  out.reserve(items.size());
  for (const StepItem& item : items)
    out.push_back({item.sequence, item.tokens, item.sample, item.score, item.logits, item.hidden});
  return out;
}

rust::Vec<ItemOutput> to_rust(const std::vector<gemma_cuda::ItemOutput>& outputs) {
  rust::Vec<ItemOutput> out;
  for (const gemma_cuda::ItemOutput& item : outputs)
    out.push_back({item.sequence, to_rust(item.sampled), to_rust(item.scored), to_rust(item.logits),
                   to_rust(item.hidden), rust::String(item.failure)});
  return out;
}

}  // namespace

ModelConfig parse_config(rust::Str json) {
  const gemma_cuda::ModelConfig config = gemma_cuda::parse_config(view(json));
  return {to_rust(config.spec), config.vocab_given};
}

rust::String canonical_tensor_name(rust::Str name) {
  return rust::String::lossy(gemma_cuda::canonical_tensor_name(view(name)).value_or(""));
}

rust::Vec<uint8_t> quantize_e4m3(DType dtype, rust::Slice<const uint8_t> bytes, rust::Slice<const float> scales) {
  rust::Vec<uint8_t> out;
  const std::vector<e4m3> codes = gemma_cuda::quantize_rows(from_rust(dtype), view(bytes), view(scales));
  out.reserve(codes.size());
  for (e4m3 code : codes) out.push_back(code.bits);
  return out;
}

rust::Vec<TensorSlot> tensor_table(const ModelSpec& spec) {
  const gemma_cuda::ModelSpec model = from_rust(spec);
  validate(model);
  rust::Vec<TensorSlot> out;
  for (const gemma_cuda::TensorSlot& slot : gemma_cuda::tensor_table(model)) {
    TensorSlot row{rust::String(slot.name), {}};
    for (uint64_t extent : slot.shape) row.shape.push_back(extent);
    out.push_back(std::move(row));
  }
  return out;
}

MemoryBudget memory_budget(const ModelSpec& spec, const EngineOptions& options) {
  const gemma_cuda::MemoryBudget budget = gemma_cuda::memory_budget(from_rust(spec), from_rust(options));
  return {budget.weights, budget.kv_cache, budget.activations, budget.logits, budget.workspace, budget.total()};
}

Engine::Engine(gemma_cuda::ModelSpec spec, gemma_cuda::EngineOptions options)
    : engine_(std::move(spec), std::move(options)) {}

rust::String Engine::device_name() const { return engine_.device_name(); }

void Engine::load_tensor(rust::Str name, DType dtype, rust::Slice<const uint64_t> shape,
                         rust::Slice<const uint8_t> bytes) {
  engine_.load_tensor(view(name), from_rust(dtype), view(shape), view(bytes));
}

void Engine::load_random(uint64_t seed) { engine_.load_random(seed); }

void Engine::finish_loading() { engine_.finish_loading(); }

uint32_t Engine::add_sequence(rust::Slice<const uint32_t> tokens, uint32_t prompt_tokens,
                              const SamplingConfig& sampling, bool reuse_prefix) {
  return engine_.add_sequence(view(tokens), prompt_tokens, from_rust(sampling), reuse_prefix);
}

void Engine::append_tokens(uint32_t sequence, rust::Slice<const uint32_t> tokens) {
  engine_.append_tokens(sequence, view(tokens));
}

void Engine::remove_sequence(uint32_t sequence) { engine_.remove_sequence(sequence); }

SequenceState Engine::sequence_state(uint32_t sequence) const {
  const gemma_cuda::SequenceState state = engine_.sequence_state(sequence);
  return {state.tokens, state.cached};
}

uint32_t Engine::free_pages() const { return engine_.free_pages(); }

uint32_t Engine::pages_for(uint32_t sequence, uint32_t tokens) const { return engine_.pages_for(sequence, tokens); }

rust::Vec<ItemOutput> Engine::step(rust::Slice<const StepItem> items) {
  return to_rust(engine_.step(from_rust(items)));
}

void Engine::launch(rust::Slice<const StepItem> items) { engine_.launch(from_rust(items)); }

rust::Vec<ItemOutput> Engine::collect() { return to_rust(engine_.collect()); }

bool Engine::runs_ahead() const { return engine_.runs_ahead(); }

void Engine::start_calibration() { engine_.start_calibration(); }

rust::Vec<Observation> Engine::calibration() const {
  rust::Vec<Observation> out;
  for (const gemma_cuda::Observation& observation : engine_.calibration()) {
    Observation own{rust::String(observation.name), to_rust(observation.largest), {}};
    own.counts.reserve(observation.counts.size());
    for (uint64_t count : observation.counts) own.counts.push_back(count);
    out.push_back(std::move(own));
  }
  return out;
}

EngineStatistics Engine::statistics() const {
  const gemma_cuda::EngineStatistics all = engine_.statistics();
  return {all.steps, all.captured_steps, all.tokens, all.bytes_read, all.flops, all.memory, all.peak_memory};
}

double Engine::copy_bandwidth() { return engine_.copy_bandwidth(); }

std::unique_ptr<Engine> new_engine(const ModelSpec& spec, const EngineOptions& options) {
  return std::make_unique<Engine>(from_rust(spec), from_rust(options));
}

}  // namespace gemma_cuda::bridge
