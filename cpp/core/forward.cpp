#include "core/forward.h"

#include <algorithm>
#include <cmath>

#include "ops/convert.h"

namespace gemma_cuda {
namespace {

// The widest of some per-layer number.
template <class F>
uint64_t widest(const ModelSpec& spec, F width) {
  uint64_t out = 0;
  for (const LayerSpec& layer : spec.layers) out = std::max<uint64_t>(out, width(layer));
  return out;
}

DType cache_type(const LayerSpec& layer, const ForwardLimits& limits) {
  return layer.fp8_cache ? DType::e4m3 : limits.act;
}
uint64_t kv_layer_bytes(const LayerSpec& layer, const ForwardLimits& limits) {
  return uint64_t{limits.pages} * limits.page_size * layer.kv_width() * size_of(cache_type(layer, limits));
}

uint64_t pages_per_sequence(const ModelSpec& spec, const ForwardLimits& limits) {
  return std::min<uint64_t>(limits.pages, (uint64_t{spec.max_positions} + limits.page_size - 1) / limits.page_size);
}

uint64_t sample_table_bytes(const ModelSpec& spec, uint64_t rows) {
  return rows * sizeof(SampleTask) + uint64_t{spec.vocab_size} * sizeof(Adjustment);
}

// The MLP takes so many tokens at a time: enough for the products to be at their full speed, while what lies between
// them, several times as wide as a model's other activations, takes half the memory that a whole pass of 8192 would.
// Where the gated product is fused, its result has all of that memory.
constexpr uint32_t kMlpTokens = 4096, kFusedMlpTokens = 3 * kMlpTokens;

// Where the parts of a block's own memory begin, in bytes, and where the last one ends.
struct BlockLayout {
  uint64_t q, attended, activated, end;

  BlockLayout(const ModelSpec& spec, const ForwardLimits& limits) {
    const uint64_t row = size_of(limits.act), t = limits.tokens * row;
    const uint64_t slice = std::min(limits.tokens, kMlpTokens) * row;
    const uint64_t q_bytes = t * widest(spec, [](const LayerSpec& l) { return l.q_width(); });
    q = aligned(t * widest(spec, [](const LayerSpec& l) { return l.qkv_width(); }));
    attended = aligned(q + q_bytes);
    activated = aligned(slice * 2 * spec.ffn_size);
    end = std::max(attended + q_bytes, activated + slice * spec.ffn_size);
  }
  static uint64_t aligned(uint64_t at) { return (at + 255) / 256 * 256; }
};

// Inputs of products in FP8: nothing where there are none.
uint64_t x8_rows(const ModelSpec& spec, const ForwardLimits& limits) {
  return uses_fp8(spec) ? std::max(limits.tokens, limits.logit_rows) : 0;
}
uint64_t x8_bytes(const ModelSpec& spec, const ForwardLimits& limits) {
  return x8_rows(spec, limits) *
         std::max<uint64_t>(spec.hidden_size, widest(spec, [](const LayerSpec& l) { return l.q_width(); }));
}
// A matrix that is quantized for every product: nothing where there is none.
uint64_t cast_bytes(const ModelSpec& spec) {
  uint64_t most = 0;
  for (const LayerSpec& layer : spec.layers) {
    const uint64_t hidden = spec.hidden_size;
    if (layer.qkv == Scheme::fp8_cast) most = std::max(most, hidden * layer.qkv_width());
    if (layer.attention_out == Scheme::fp8_cast) most = std::max(most, hidden * layer.q_width());
    if (layer.gate_up == Scheme::fp8_cast) most = std::max(most, hidden * 2 * spec.ffn_size);
    if (layer.down == Scheme::fp8_cast) most = std::max(most, hidden * spec.ffn_size);
  }
  return most;
}
uint64_t cast_scale_bytes(const ModelSpec& spec) {
  const uint64_t rows = std::max<uint64_t>(
      {spec.hidden_size, 2ull * spec.ffn_size, widest(spec, [](const LayerSpec& l) { return l.qkv_width(); })});
  return cast_bytes(spec) > 0 ? rows * sizeof(float) : 0;
}
uint64_t x_scale_bytes(const ModelSpec& spec, const ForwardLimits& limits) {
  return x8_rows(spec, limits) * sizeof(float);
}

// Of the largest plan, captured or not.
uint64_t table_bytes(const ModelSpec& spec, const ForwardLimits& limits) {
  const uint64_t s = limits.sequences, t = limits.tokens, tiles = t / kQueryTile + std::max<uint64_t>(s, kShortPrompts);
  const uint64_t words = 3 * t + 2 * s + 1 + s * pages_per_sequence(spec, limits) + limits.logit_rows + 2 * tiles;
  return words * sizeof(uint32_t) + alignof(SampleTask) + sample_table_bytes(spec, limits.logit_rows);
}

// Whether the last layer had best go on with the rows alone whose logits are wanted: prompts have many and want one.
// Of a pass that reads the weights all the same little is gained.
bool few_are_wanted(const BatchPlan& plan) {
  constexpr uint32_t kLeast = 64;
  return plan.tokens() >= kLeast && 2 * plan.logit_rows.size() <= plan.tokens();
}

// sqrt(hidden), as the activations' type holds it.
float embedding_scale(const ModelSpec& spec, DType act) {
  const float scale = std::sqrt(static_cast<float>(spec.hidden_size));
  return act == DType::bf16 ? to_float(to_bf16(scale)) : scale;
}

}  // namespace

Forward::Forward(Backend& backend, const ModelSpec& spec, const Weights& weights, ForwardLimits limits)
    : backend_(backend),
      spec_(spec),
      weights_(weights),
      limits_(limits),
      embedding_scale_(embedding_scale(spec, limits.act)) {
  const uint64_t t = limits.tokens, r = limits.logit_rows, act = size_of(limits.act);
  table_memory_ = Buffer(backend, table_bytes(spec, limits));

  const uint64_t hidden = spec.hidden_size;
  const BlockLayout layout(spec, limits);
  act_.residual = Buffer(backend, t * hidden * sizeof(float));
  act_.x = Buffer(backend, t * hidden * act);
  act_.x8 = Buffer(backend, x8_bytes(spec, limits));
  act_.x_scales = Buffer(backend, x_scale_bytes(spec, limits));
  act_.activated_scales = Buffer(backend, x_scale_bytes(spec, limits));
  act_.cast = Buffer(backend, cast_bytes(spec));
  act_.cast_scales = Buffer(backend, cast_scale_bytes(spec));
  act_.within = Buffer(backend, layout.end);
  char* within = act_.within.as<char>();
  act_.qkv = act_.gate_up = within;
  act_.q = within + layout.q;
  act_.attended = within + layout.attended;
  act_.activated = within + layout.activated;
  act_.residual_last = Buffer(backend, r * hidden * sizeof(float));
  act_.last = Buffer(backend, r * hidden * act);
  act_.logits = Buffer(backend, logit_bytes(spec, limits));
  for (const LayerSpec& layer : spec.layers) {
    const uint64_t bytes = kv_layer_bytes(layer, limits);
    kv_.push_back({Buffer(backend, bytes), Buffer(backend, bytes)});
  }
}

uint64_t Forward::kv_cache_bytes(const ModelSpec& spec, const ForwardLimits& limits) {
  uint64_t total = 0;
  for (const LayerSpec& layer : spec.layers) total += 2 * kv_layer_bytes(layer, limits);
  return total;
}

uint64_t Forward::activation_bytes(const ModelSpec& spec, const ForwardLimits& limits) {
  const uint64_t t = limits.tokens, r = limits.logit_rows, act = size_of(limits.act);
  return table_bytes(spec, limits) + BlockLayout(spec, limits).end + x8_bytes(spec, limits) +
         2 * x_scale_bytes(spec, limits) + cast_bytes(spec) + cast_scale_bytes(spec) +
         spec.hidden_size * (t + r) * (sizeof(float) + act);
}

uint64_t Forward::logit_bytes(const ModelSpec& spec, const ForwardLimits& limits) {
  return uint64_t{limits.logit_rows} * spec.vocab_size * sizeof(float);
}

const float* Forward::run(const BatchPlan& plan, const SamplePlan& samples, uint32_t* last_tokens,
                          std::vector<std::vector<float>>* hidden) {
  last_tokens_ = last_tokens;
  const SamplePlan nothing;
  const SamplePlan& within = holds(samples) ? samples : nothing;
  uint32_t rows = static_cast<uint32_t>(plan.logit_rows.size());
  if (const CapturedPass* found = hidden == nullptr && observer_ == nullptr ? captured(plan) : nullptr) {
    upload(fill_up(plan, found->shape), within);
    found->graph->launch();
    rows = found->shape.logit_rows;
  } else {
    upload(plan, within);
    pass(plan, hidden);
  }
  if (!holds(samples)) sample_behind(samples, rows);
  const uint32_t stride = holds(samples) ? kTopRoom : samples.max_top;
  backend_.start_results(static_cast<uint32_t>(samples.tasks.size()), samples.max_top == 0 ? 0 : stride);
  return act_.logits.as<float>();
}

// The smallest recorded pass that can serve this plan.
const Forward::CapturedPass* Forward::captured(const BatchPlan& plan) const {
  const auto found =
      std::ranges::find_if(captured_, [&](const CapturedPass& candidate) { return candidate.shape.fits(plan); });
  return found == captured_.end() ? nullptr : &*found;
}

void Forward::warm_up(uint32_t* last_tokens) {
  if (!backend_.captures()) return;
  last_tokens_ = last_tokens;
  BatchPlan nobody;
  nobody.cu_seqlens = {0};
  auto run_once = [&](const PassShape& shape) {
    BatchPlan plan = fill_up(nobody, shape);
    // Rows that differ: on equal ones the chip takes less power, and other algorithms would win.
    for (uint32_t row = 0; row < shape.tokens; ++row) plan.ids[row] = row % spec_.vocab_size;
    upload(plan, {});
    pass(plan, nullptr);  // libraries choose their algorithms, scratch memory grows: nothing that can be recorded
    return plan;
  };
  backend_.tune(true);
  run_once(largest());
  for (const PassShape& shape : captured_shapes(largest())) {
    const BatchPlan plan = run_once(shape);
    if (limits_.graphs) captured_.push_back({shape, backend_.capture([&] { pass(plan, nullptr); })});
  }
  backend_.tune(false);
}

PassShape Forward::largest() const {
  return {limits_.tokens, limits_.sequences, limits_.logit_rows, limits_.tokens / kQueryTile,
          static_cast<uint32_t>(pages_per_sequence(spec_, limits_))};
}

void Forward::pass(const BatchPlan& plan, std::vector<std::vector<float>>* hidden) {
  const uint32_t tokens = plan.tokens(), layers = static_cast<uint32_t>(spec_.layers.size());
  ++passes_;
  backend_.embed({.ids = tables_.ids,
                  .last_tokens = last_tokens_,
                  .tokens = tokens,
                  .table = weights_.embedding(),
                  .scale = embedding_scale_,
                  .residual = act_.residual.as<float>()});
  keep_hidden(hidden, tokens);
  const Linear& first = weights_.layer(0).qkv;
  backend_.norm({.residual = act_.residual.as<float>(),
                 .weight = weights_.layer(0).pre_attention_norm.as<float>(),
                 .out = input_of(first),
                 .tokens = tokens,
                 .hidden = spec_.hidden_size,
                 .eps = spec_.rms_norm_eps,
                 .quantize = quantize(first, act_.x_scales)});
  Stream stream{act_.residual.as<float>(), tokens, tables_.logit_rows};
  for (uint32_t i = 0; i < layers; ++i) {
    const bool post = spec_.layers[i].post_norms;
    const LayerWeights& weights = weights_.layer(i);
    const LayerWeights* next = i + 1 < layers ? &weights_.layer(i + 1) : nullptr;
    const bool last = next == nullptr;
    if (last && hidden == nullptr && observer_ == nullptr && few_are_wanted(plan)) stream = narrowed(plan);
    attention_block(
        i, plan, stream,
        add_and_norm(stream, post ? &weights.post_attention_norm : nullptr, &weights.pre_mlp_norm, &weights.gate_up));
    if (stream.tokens > 0)
      mlp_block(i, stream.tokens,
                add_and_norm(stream, post ? &weights.post_mlp_norm : nullptr,
                             next ? &next->pre_attention_norm : nullptr, next ? &next->qkv : nullptr));
    keep_hidden(hidden, tokens);
  }
  if (hidden != nullptr) replace_last_hidden(*hidden, tokens);
  if (observer_ != nullptr) observe_last(tokens);
  sample_last(plan, stream);
}

Forward::Stream Forward::narrowed(const BatchPlan& plan) {
  const auto rows = static_cast<uint32_t>(plan.logit_rows.size());
  backend_.gather_rows({.from = act_.residual.data(),
                        .rows = tables_.logit_rows,
                        .count = rows,
                        .row_bytes = uint64_t{spec_.hidden_size} * sizeof(float),
                        .to = act_.residual_last.data()});
  return {act_.residual_last.as<float>(), rows, nullptr};
}

void Forward::upload(const BatchPlan& plan, const SamplePlan& samples) {
  std::vector<char> bytes;
  auto put = [&]<class T>(const std::vector<T>& part) {
    bytes.resize((bytes.size() + alignof(T) - 1) / alignof(T) * alignof(T));
    const char* device = table_memory_.as<char>() + bytes.size();
    const char* host = reinterpret_cast<const char*>(part.data());
    bytes.insert(bytes.end(), host, host + part.size() * sizeof(T));
    return reinterpret_cast<const T*>(device);
  };
  tables_.ids = put(plan.ids);
  tables_.positions = put(plan.positions);
  tables_.slots = put(plan.slots);
  tables_.cu_seqlens = put(plan.cu_seqlens);
  tables_.kv_len = put(plan.kv_len);
  tables_.block_table = put(plan.block_table);
  tables_.logit_rows = put(plan.logit_rows);
  tables_.query_tiles = put(plan.query_tiles);
  std::vector<SampleTask> tasks = samples.tasks;
  tasks.resize(plan.logit_rows.size(), SampleTask::nothing());
  tables_.tasks = put(tasks);
  tables_.adjustments = put(samples.adjustments);
  backend_.upload(table_memory_.data(), bytes.data(), bytes.size());
}

void Forward::attention_block(uint32_t index, const BatchPlan& plan, const Stream& stream, const NormArgs& add) {
  const LayerSpec& layer = spec_.layers[index];
  const LayerWeights& weights = weights_.layer(index);
  const uint32_t tokens = plan.tokens();
  const KvLayer cache{kv_[index].keys.data(),
                      kv_[index].values.data(),
                      cache_type(layer, limits_),
                      limits_.page_size,
                      layer.kv_heads,
                      layer.head_dim,
                      weights.key_scales.as<float>(),
                      weights.value_scales.as<float>()};

  observe(act_.x.data(), tokens, spec_.hidden_size, &Calibration::Layer::qkv, index);
  const GemmArgs qkv = product(input_of(weights.qkv), quantize(weights.qkv, act_.x_scales), weights.qkv, act_.qkv,
                               tokens, limits_.tokens);
  backend_.rope_gemm(qkv, {.qkv = act_.qkv,
                           .positions = tables_.positions,
                           .slots = tables_.slots,
                           .inverse_frequency = weights.inverse_frequency.as<float>(),
                           .q_norm = weights.q_norm.as<float>(),
                           .k_norm = weights.k_norm.as<float>(),
                           .eps = spec_.rms_norm_eps,
                           .heads = layer.heads,
                           .q = act_.q,
                           .cache = cache,
                           .tokens = tokens});
  if (observer_ != nullptr)
    backend_.observe_cache({.cache = cache,
                            .slots = tables_.slots,
                            .tokens = tokens,
                            .keys = observer_->layer(index).keys,
                            .values = observer_->layer(index).values});
  if (stream.tokens == 0) return;  // of what is left only the keys and values were wanted
  const Quantize how = quantize(weights.attention_out, act_.x_scales);
  const Quantize fused{.scale = how.scale, .row_scales = nullptr};
  backend_.attention({.q = act_.q,
                      .cache = cache,
                      .cu_seqlens = tables_.cu_seqlens,
                      .kv_len = tables_.kv_len,
                      .block_table = tables_.block_table,
                      .sequences = plan.sequences(),
                      .max_pages = plan.max_pages,
                      .pass = passes_,
                      .query_tiles = tables_.query_tiles,
                      .tiles = static_cast<uint32_t>(plan.query_tiles.size()),
                      .heads = layer.heads,
                      .window = layer.window,
                      .scale = layer.attention_scale,
                      .soft_cap = layer.attention_soft_cap,
                      .out = act_.attended,
                      .tokens = tokens,
                      .quantize = fused});
  observe(act_.attended, tokens, layer.q_width(), &Calibration::Layer::attention_out, index);
  const void* attended = act_.attended;
  if (stream.tokens < tokens) {
    attended = act_.q;  // which is no longer needed
    backend_.gather_rows({.from = act_.attended,
                          .rows = tables_.logit_rows,
                          .count = stream.tokens,
                          .row_bytes = layer.q_width() * size_of(fused ? DType::e4m3 : limits_.act),
                          .to = act_.q});
  }
  if (how.row_scales != nullptr) {  // a token's heads are not computed together
    backend_.quantize({.x = attended,
                       .dtype = limits_.act,
                       .how = how,
                       .out = act_.x8.data(),
                       .rows = stream.tokens,
                       .width = layer.q_width()});
    attended = act_.x8.data();
  }
  backend_.gemm_norm(product(attended, how, weights.attention_out, act_.x.data(), stream.tokens, limits_.tokens), add);
}

void Forward::mlp_block(uint32_t index, uint32_t tokens, const NormArgs& add) {
  const LayerWeights& weights = weights_.layer(index);
  const size_t hidden = spec_.hidden_size;
  const size_t x_element = size_of(weights.gate_up.scheme == Scheme::plain ? limits_.act : DType::e4m3);
  const Quantize how = quantize(weights.down, act_.activated_scales);
  GatedGemmArgs args{.x = input_of(weights.gate_up),
                     .w = weights_.matrix(weights.gate_up),
                     .act = limits_.act,
                     .gate_up = act_.gate_up,
                     .out = act_.activated,
                     .tokens = tokens,
                     .x_scale = quantize(weights.gate_up, act_.x_scales),
                     .quantize = how};
  const bool fused = weights.gate_up.scheme != Scheme::fp8_cast && backend_.fuses_gated_gemm(args);
  const uint32_t most = fused ? kFusedMlpTokens : kMlpTokens;
  if (fused) args.out = act_.gate_up;
  for (uint32_t from = 0; from < tokens; from += most) {
    // The rows behind a slice are the next one's input.
    args.tokens = std::min(tokens - from, most);
    args.capacity = from + args.tokens < tokens ? args.tokens : std::min(limits_.tokens - from, most);
    args.x = input_of(weights.gate_up) + from * hidden * x_element;
    args.w = matrix_of(weights.gate_up);
    char* block = act_.x.as<char>() + from * hidden * size_of(limits_.act);
    observe(block, args.tokens, spec_.hidden_size, &Calibration::Layer::gate_up, index);
    backend_.gated_gemm(args);
    observe(args.out, args.tokens, spec_.ffn_size, &Calibration::Layer::down, index);
    const GemmArgs down = product(args.out, how, weights.down, block, args.tokens, args.capacity);
    if (args.tokens == tokens) return backend_.gemm_norm(down, add);
    backend_.gemm(down);
    if (args.x_scale.row_scales != nullptr) args.x_scale.row_scales += args.tokens;
  }
  backend_.norm(add);
}

NormArgs Forward::add_and_norm(const Stream& stream, const Buffer* post, const Buffer* next, const Linear* reader) {
  return {.residual = stream.residual,
          .delta = act_.x.data(),
          .delta_weight = post ? post->as<float>() : nullptr,
          .weight = next ? next->as<float>() : nullptr,
          .out = reader ? input_of(*reader) : nullptr,
          .tokens = stream.tokens,
          .hidden = spec_.hidden_size,
          .eps = spec_.rms_norm_eps,
          .quantize = reader ? quantize(*reader, act_.x_scales) : Quantize{}};
}

// Of a model without FP8: there is nothing to be learned from what is quantized already.
void Forward::observe(const void* x, uint32_t rows, uint32_t width, Magnitudes Calibration::Layer::*what,
                      uint32_t layer) {
  if (observer_ != nullptr)
    backend_.observe({.x = x, .rows = rows, .width = width, .to = observer_->layer(layer).*what});
}

Quantize Forward::quantize(const Linear& reader, const Buffer& row_scales) const {
  switch (reader.scheme) {
    case Scheme::plain: return {};
    case Scheme::fp8_cast:
    case Scheme::fp8_static: return {.scale = reader.input_scale.as<float>(), .row_scales = nullptr};
    case Scheme::fp8_dynamic: return {.scale = nullptr, .row_scales = row_scales.as<float>()};
  }
  return {};
}

char* Forward::input_of(const Linear& reader) const {
  return (reader.scheme == Scheme::plain ? act_.x : act_.x8).as<char>();
}

// As products read it; one of fp8_cast is quantized first, and stays until the next.
Matrix Forward::matrix_of(const Linear& w) {
  const Matrix matrix = weights_.matrix(w);
  if (w.scheme != Scheme::fp8_cast) return matrix;
  backend_.quantize({.x = matrix.data,
                     .dtype = matrix.dtype,
                     .how = {.scale = nullptr, .row_scales = act_.cast_scales.as<float>()},
                     .out = act_.cast.data(),
                     .rows = w.rows,
                     .width = w.cols});
  return {.data = act_.cast.data(),
          .dtype = DType::e4m3,
          .rows = w.rows,
          .cols = w.cols,
          .scales = act_.cast_scales.as<float>(),
          .fresh = true};
}

GemmArgs Forward::product(const void* x, Quantize x_scale, const Linear& w, void* out, uint32_t tokens,
                          uint32_t capacity) {
  return {.x = x,
          .w = matrix_of(w),
          .out = out,
          .out_dtype = limits_.act,
          .tokens = tokens,
          .capacity = capacity,
          .x_scale = x_scale};
}

void Forward::sample_last(const BatchPlan& plan, const Stream& stream) {
  const uint32_t rows = static_cast<uint32_t>(plan.logit_rows.size());
  if (rows == 0) return;
  const Quantize how = quantize(weights_.lm_head_linear(), act_.x_scales);
  void* last = (how ? act_.x8 : act_.last).data();
  backend_.norm({.residual = stream.residual,
                 .rows = stream.logit_rows,
                 .weight = weights_.final_norm().as<float>(),
                 .out = last,
                 .tokens = rows,
                 .hidden = spec_.hidden_size,
                 .eps = spec_.rms_norm_eps,
                 .quantize = how});
  const GemmArgs logits{.x = last,
                        .w = weights_.lm_head(),
                        .out = act_.logits.data(),
                        .out_dtype = DType::f32,
                        .tokens = rows,
                        .capacity = limits_.logit_rows,
                        .x_scale = how};
  backend_.sampled_gemm(logits, spec_.final_soft_cap, sampling(tables_.tasks, tables_.adjustments, 0, rows, kTopRoom));
}

SampleArgs Forward::sampling(const SampleTask* tasks, const Adjustment* adjustments, uint32_t first, uint32_t count,
                             uint32_t max_top) const {
  return {.logits = act_.logits.as<float>(),
          .vocab = spec_.vocab_size,
          .tasks = tasks,
          .adjustments = adjustments,
          .first = first,
          .count = count,
          .max_top = max_top,
          .last_tokens = last_tokens_};
}

// Whether a pass has room for these tasks' adjustments and for what they report. A captured one is as it was recorded,
// so others are done behind it; their results do not differ.
bool Forward::holds(const SamplePlan& samples) const {
  return samples.max_top <= kTopRoom && samples.adjustments.size() <= spec_.vocab_size;
}

// There is room for one adjustment a token of the vocabulary, the most that one row can have. `rows`: of the pass.
void Forward::sample_behind(const SamplePlan& samples, uint32_t rows) {
  uint32_t first = 0;
  for (const SamplePlan& part : samples.parts(spec_.vocab_size)) {
    const uint32_t count = static_cast<uint32_t>(part.tasks.size());
    const size_t task_bytes = count * sizeof(SampleTask), bytes = part.adjustments.size() * sizeof(Adjustment);
    char* table = table_memory_.as<char>();
    backend_.upload(table, part.tasks.data(), task_bytes);
    if (bytes > 0) backend_.upload(table + task_bytes, part.adjustments.data(), bytes);
    SampleArgs args = sampling(reinterpret_cast<const SampleTask*>(table),
                               reinterpret_cast<const Adjustment*>(table + task_bytes), first, count, samples.max_top);
    args.product_rows = rows;
    backend_.sample(args);
    first += count;
  }
}

void Forward::keep_hidden(std::vector<std::vector<float>>* hidden, uint32_t tokens) {
  if (hidden == nullptr) return;
  std::vector<float>& rows = hidden->emplace_back(size_t{tokens} * spec_.hidden_size);
  backend_.download(rows.data(), act_.residual.data(), rows.size() * sizeof(float));
}

// The inputs of the output embedding, of all tokens and not only of those whose logits are wanted.
void Forward::observe_last(uint32_t tokens) {
  norm_last(tokens);
  backend_.observe({.x = act_.x.data(), .rows = tokens, .width = spec_.hidden_size, .to = observer_->lm_head()});
}

// x = the final norm of all rows.
void Forward::norm_last(uint32_t tokens) {
  backend_.norm({.residual = act_.residual.as<float>(),
                 .weight = weights_.final_norm().as<float>(),
                 .out = act_.x.data(),
                 .tokens = tokens,
                 .hidden = spec_.hidden_size,
                 .eps = spec_.rms_norm_eps});
}

void Forward::replace_last_hidden(std::vector<std::vector<float>>& hidden, uint32_t tokens) {
  std::vector<float>& rows = hidden.back();
  norm_last(tokens);
  if (limits_.act == DType::f32) {
    backend_.download(rows.data(), act_.x.data(), rows.size() * sizeof(float));
    return;
  }
  std::vector<bf16> narrow(rows.size());
  backend_.download(narrow.data(), act_.x.data(), narrow.size() * sizeof(bf16));
  std::ranges::transform(narrow, rows.begin(), [](bf16 x) { return to_float(x); });
}

}  // namespace gemma_cuda
