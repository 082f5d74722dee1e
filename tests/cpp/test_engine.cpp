// The engine on random models: however the work is cut - whole, in chunks, ragged beside others, with any page size,
// on pages taken over from another sequence - the logits are the same, bit for bit; and bad calls change nothing.
#include <algorithm>
#include <bit>

#include "check.h"
#include "core/engine.h"
#include "ops/convert.h"

using namespace gemma_cuda;

namespace {

ModelSpec random_model(int family) {
  ModelSpec spec;
  spec.vocab_size = 61;
  spec.hidden_size = 40;
  spec.ffn_size = 72;
  spec.max_positions = 64;
  spec.final_soft_cap = family == 2 ? 10.0f : 0.0f;
  spec.tied_embeddings = family != 1;
  for (uint32_t i = 0; i < 3; ++i) {
    LayerSpec layer;
    layer.heads = 4;
    layer.kv_heads = 1u << test::below(3);
    layer.head_dim = 2 * (1 + test::below(24));
    layer.window = family == 1 || i == 1 ? 0 : 6;
    layer.rope_factor = family == 3 && i == 1 ? 8.0 : 1.0;
    layer.attention_scale = 0.3f;
    layer.attention_soft_cap = family == 2 ? 4.0f : 0.0f;
    layer.post_norms = family != 1;
    layer.qk_norm = family == 3;
    spec.layers.push_back(layer);
  }
  return spec;
}

using Parameters = std::vector<std::pair<TensorSlot, std::vector<float>>>;

Parameters random_parameters(const ModelSpec& spec) {
  Parameters out;
  for (const TensorSlot& slot : tensor_table(spec)) {
    size_t count = 1;
    for (uint64_t extent : slot.shape) count *= extent;
    if (slot.part == Part::scales) continue;  // matrices come unquantized
    std::vector<float> values = test::normal(count, 0.3f);
    if (slot.part != Part::values)
      for (float& x : values) x = 0.02f + 0.01f * std::abs(x);
    out.emplace_back(slot, std::move(values));
  }
  return out;
}

ModelSpec in_fp8(ModelSpec spec, Scheme scheme, bool cache, bool lm_head) {
  for (LayerSpec& layer : spec.layers) {
    layer.qkv = layer.attention_out = layer.gate_up = layer.down = scheme;
    layer.fp8_cache = cache;
  }
  if (lm_head) spec.lm_head = scheme;
  return spec;
}

std::span<const uint8_t> bytes_of(const std::vector<float>& values) {
  return {reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(float)};
}

std::unique_ptr<Engine> make_engine(const ModelSpec& spec, const Parameters& parameters, EngineOptions options) {
  options.device = "reference";
  options.threads = 2;
  auto engine = std::make_unique<Engine>(spec, options);
  for (const auto& [slot, values] : parameters)
    engine->load_tensor(slot.name, DType::f32, slot.shape, bytes_of(values));
  engine->finish_loading();
  return engine;
}

std::vector<uint32_t> random_tokens(const ModelSpec& spec, uint32_t count) {
  std::vector<uint32_t> out(count);
  for (uint32_t& token : out) token = test::below(spec.vocab_size);
  return out;
}

StepItem want_logits(uint32_t sequence, uint32_t tokens) { return {sequence, tokens, false, false, true, false}; }

std::vector<float> whole(Engine& engine, const std::vector<uint32_t>& tokens) {
  const uint32_t id = engine.add_sequence(tokens, 1, {}, false);
  const StepItem item = want_logits(id, static_cast<uint32_t>(tokens.size()));
  std::vector<float> logits = engine.step({&item, 1})[0].logits;
  engine.remove_sequence(id);
  return logits;
}

std::vector<float> chunked(Engine& engine, const std::vector<uint32_t>& tokens, uint32_t chunk) {
  const uint32_t id = engine.add_sequence(tokens, 1, {}, false);
  std::vector<float> logits;
  for (uint32_t left = static_cast<uint32_t>(tokens.size()); left > 0;) {
    const StepItem item = want_logits(id, std::min(chunk, left));
    const std::vector<float> part = engine.step({&item, 1})[0].logits;
    logits.insert(logits.end(), part.begin(), part.end());
    left -= item.tokens;
  }
  engine.remove_sequence(id);
  return logits;
}

// All sequences at once, each advanced by random amounts.
std::vector<std::vector<float>> ragged(Engine& engine, const std::vector<std::vector<uint32_t>>& prompts) {
  std::vector<uint32_t> ids, left;
  std::vector<std::vector<float>> logits(prompts.size());
  for (const auto& tokens : prompts) {
    ids.push_back(engine.add_sequence(tokens, 1, {}, false));
    left.push_back(static_cast<uint32_t>(tokens.size()));
  }
  while (std::ranges::any_of(left, [](uint32_t n) { return n > 0; })) {
    std::vector<StepItem> items;
    std::vector<size_t> who;
    for (size_t i = 0; i < prompts.size(); ++i)
      if (left[i] > 0 && test::below(3) > 0) {
        items.push_back(want_logits(ids[i], 1 + test::below(std::min(left[i], 9u))));
        who.push_back(i);
      }
    if (items.empty()) continue;
    const std::vector<ItemOutput> outputs = engine.step(items);
    for (size_t k = 0; k < items.size(); ++k) {
      logits[who[k]].insert(logits[who[k]].end(), outputs[k].logits.begin(), outputs[k].logits.end());
      left[who[k]] -= items[k].tokens;
    }
  }
  for (uint32_t id : ids) engine.remove_sequence(id);
  return logits;
}

void cutting_changes_nothing(const ModelSpec& spec, DType compute) {
  const Parameters parameters = random_parameters(spec);
  std::vector<std::vector<uint32_t>> prompts;
  for (uint32_t length : {1u, 2u, 5u, 13u, 40u}) prompts.push_back(random_tokens(spec, length));

  std::vector<std::vector<float>> first;
  for (uint32_t page_size : {1u, 3u, 16u, 64u}) {
    EngineOptions options;
    options.compute = compute;
    options.weights = compute;
    options.page_size = page_size;
    options.pages = 64;
    const auto engine = make_engine(spec, parameters, options);
    for (size_t i = 0; i < prompts.size(); ++i) {
      const std::vector<float> logits = whole(*engine, prompts[i]);
      CHECK(std::ranges::all_of(logits, [](float x) { return std::isfinite(x); }));
      if (page_size == 1) first.push_back(logits);
      CHECK(logits == first[i]);
      for (uint32_t chunk = 1; chunk <= 7; ++chunk) CHECK(chunked(*engine, prompts[i], chunk) == first[i]);
    }
    CHECK(ragged(*engine, prompts) == first);
    CHECK(engine->free_pages() == options.pages);
  }
}

// In FP8 with scales, or wider and quantized while loading: the same bits, and near what was computed without FP8.
void fp8_weights_mean_the_same_however_they_come() {
  const ModelSpec plain = random_model(3);
  for (Scheme scheme : {Scheme::fp8_static, Scheme::fp8_dynamic}) {
    const ModelSpec spec = in_fp8(plain, scheme, true, true);
    Parameters parameters = random_parameters(spec);
    EngineOptions options;
    options.compute = options.weights = DType::f32;
    const std::vector<uint32_t> tokens = random_tokens(spec, 20);
    const auto wide = make_engine(spec, parameters, options);
    options.device = "reference";
    Engine narrow(spec, options);
    const std::vector<TensorSlot> table = tensor_table(spec);
    const auto is = [&](const std::string& name) {
      return std::ranges::any_of(table, [&](const TensorSlot& slot) { return slot.name == name; });
    };
    for (const auto& [slot, values] : parameters) {
      if (!is(slot.name + "_scale")) {
        narrow.load_tensor(slot.name, DType::f32, slot.shape, bytes_of(values));
        continue;
      }
      std::vector<e4m3> codes;
      std::vector<float> scales;
      for (size_t row = 0; row < slot.shape[0]; ++row) {
        const std::span own = std::span(values).subspan(row * slot.shape[1], slot.shape[1]);
        float largest = 0;
        for (float x : own) largest = std::max(largest, std::abs(x));
        scales.push_back(largest / kE4m3Max);
        for (float x : own) codes.push_back(to_e4m3(x * (1.0f / scales.back())));
      }
      narrow.load_tensor(slot.name, DType::e4m3, slot.shape,
                         {reinterpret_cast<const uint8_t*>(codes.data()), codes.size()});
      narrow.load_tensor(slot.name + "_scale", DType::f32, std::vector<uint64_t>{slot.shape[0], 1}, bytes_of(scales));
    }
    narrow.finish_loading();
    const std::vector<float> logits = whole(*wide, tokens);
    CHECK(whole(narrow, tokens) == logits);

    Parameters same;  // the plain model has its tied embedding for a head, this one a head of its own: make them equal
    std::vector<float> embedding;
    for (const auto& [slot, values] : parameters) {
      if (slot.name == "model.embed_tokens.weight") embedding = values;
      if (slot.part == Part::values && slot.name != "lm_head.weight") same.emplace_back(slot, values);
    }
    for (auto& [slot, values] : parameters)
      if (slot.name == "lm_head.weight") values = embedding;
    ModelSpec tied = plain;
    tied.tied_embeddings = true;
    const std::vector<float> want = whole(*make_engine(tied, same, options), tokens);
    const std::vector<float> got = whole(*make_engine(spec, parameters, options), tokens);
    const double error = test::relative_error(got, std::vector<double>(want.begin(), want.end()));
    CHECK(error > 1e-4 && error < 0.5);  // random weights are far less forgiving than trained ones
  }
}

void weights_quantized_for_every_product_mean_the_same_as_kept_ones() {
  const ModelSpec kept = in_fp8(random_model(3), Scheme::fp8_static, true, false);
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  const Parameters parameters = random_parameters(kept);
  Parameters same;  // without the scales of rows, which are made anew
  for (const auto& [slot, values] : parameters)
    if (slot.part != Part::scales) same.emplace_back(slot, values);
  const std::vector<uint32_t> tokens = random_tokens(kept, 20);
  CHECK(whole(*make_engine(in_fp8(kept, Scheme::fp8_cast, true, false), same, options), tokens) ==
        whole(*make_engine(kept, parameters, options), tokens));
  test::check_throws("lm_head cannot be quantized for every product",
                     [&] { Engine(in_fp8(kept, Scheme::fp8_cast, true, true), options); });
}

// Each element of every activation is counted once, and how the tokens came into steps changes nothing.
void calibration_does_not_depend_on_the_batch() {
  const ModelSpec spec = random_model(3);
  const Parameters parameters = random_parameters(spec);
  std::vector<std::vector<uint32_t>> prompts;
  uint64_t tokens = 0;
  for (uint32_t length : {40u, 1u, 13u}) {
    prompts.push_back(random_tokens(spec, length));
    tokens += length;
  }
  EngineOptions options;
  options.prefix_cache = false;
  const auto gather = [&](auto feed) {
    const auto engine = make_engine(spec, parameters, options);
    whole(*engine, prompts[0]);  // before calibration: not counted
    engine->start_calibration();
    feed(*engine);
    return engine->calibration();
  };
  const std::vector<Observation> one = gather([&](Engine& engine) {
    for (const auto& prompt : prompts) whole(engine, prompt);
  });
  CHECK(one.size() == 6 * spec.layers.size() + 1);
  for (const Observation& observation : one) {
    const bool cache = observation.name.find("self_attn.k_") != std::string::npos ||
                       observation.name.find("self_attn.v_") != std::string::npos;
    uint64_t counted = 0;
    for (uint64_t count : observation.counts) counted += count;
    const uint32_t layer = observation.name.starts_with("lm_head") ? 0 : uint32_t(observation.name[13] - '0');
    const LayerSpec& shape = spec.layers[layer];
    const uint64_t width = cache                                                     ? shape.kv_width()
                           : observation.name.find("o_proj") != std::string::npos    ? shape.q_width()
                           : observation.name.find("down_proj") != std::string::npos ? spec.ffn_size
                                                                                     : spec.hidden_size;
    CHECK(observation.largest.size() == (cache ? shape.kv_heads : 1) && counted == tokens * width);
    for (size_t group = 0; group < observation.largest.size(); ++group) {
      const auto own = std::span(observation.counts).subspan(group * 4096, 4096);
      const uint32_t bin = std::bit_cast<uint32_t>(observation.largest[group]) >> 19;
      CHECK(own[bin] > 0 && std::ranges::all_of(own.subspan(bin + 1), [](uint64_t n) { return n == 0; }));
    }
  }
  const auto same = [&](const std::vector<Observation>& other) {
    return std::ranges::equal(one, other, [](const Observation& a, const Observation& b) {
      return a.name == b.name && a.largest == b.largest && a.counts == b.counts;
    });
  };
  CHECK(same(gather([&](Engine& engine) { ragged(engine, prompts); })));
  CHECK(same(gather([&](Engine& engine) {
    for (auto prompt = prompts.rbegin(); prompt != prompts.rend(); ++prompt) chunked(engine, *prompt, 3);
  })));
  test::check_throws("is in FP8 already", [&] {
    make_engine(in_fp8(spec, Scheme::fp8_dynamic, false, false), random_parameters(spec), options)->start_calibration();
  });
}

void scales_that_cannot_be_are_refused() {
  const ModelSpec spec = in_fp8(random_model(1), Scheme::fp8_static, true, false);
  EngineOptions options;
  options.device = "reference";
  Engine engine(spec, options);
  const std::string q = "model.layers.0.self_attn.q_proj", attention = "model.layers.1.self_attn";
  const std::vector<uint64_t> one{1};
  const auto load = [&](const std::string& name, const std::vector<float>& values) {
    engine.load_tensor(name, DType::f32, std::vector<uint64_t>{values.size()}, bytes_of(values));
  };
  for (float wrong : {0.0f, -1.0f, NAN, INFINITY}) {
    test::check_throws("a scale must be positive and finite", [&] { load(q + ".input_scale", {wrong}); });
    test::check_throws(q + ".weight_scale has", [&] { load(q + ".weight_scale", {wrong}); });
    test::check_throws(attention + ".k_scale has", [&] { load(attention + ".k_scale", {wrong}); });
  }
  test::check_throws("has shape [3], the model wants [1]", [&] { load(q + ".input_scale", {1, 2, 3}); });
  test::check_throws(" or one", [&] { load(q + ".weight_scale", std::vector<float>(7777, 1.0f)); });
  test::check_throws("is not one of this model's", [&] { load("model.norm.weight_scale", {1}); });
  const std::vector<uint64_t> embedding{spec.vocab_size, spec.hidden_size};
  const std::vector<uint8_t> codes(embedding[0] * embedding[1]);
  test::check_throws("is FP8, but the model is not quantized there",
                     [&] { engine.load_tensor("model.embed_tokens.weight", DType::e4m3, embedding, codes); });
  const std::vector<uint64_t> shape{spec.layers[0].q_width(), spec.hidden_size};
  const std::vector<float> weights(shape[0] * shape[1], 1.0f);
  engine.load_tensor(q + ".weight", DType::f32, shape, bytes_of(weights));
  test::check_throws("is not used: the tensor it belongs to came unquantized", [&] { load(q + ".weight_scale", {1}); });
  load(q + ".input_scale", {1});
  test::check_throws("was loaded before", [&] { load(q + ".input_scale", {1}); });
  test::check_throws("is missing", [&] { engine.finish_loading(); });
}

// Passes beyond what the MLP takes at a time.
void long_passes_have_the_results_of_short_ones() {
  ModelSpec spec = random_model(2);
  spec.max_positions = 128;
  const uint32_t sequences = 90, length = 100;
  EngineOptions options;
  options.compute = options.weights = DType::bf16;
  options.pages = 360;
  options.max_sequences = sequences;
  options.max_logit_rows = 1;
  options.max_batch_tokens = sequences * length;
  options.prefix_cache = false;
  const auto engine = make_engine(spec, random_parameters(spec), options);
  const auto hidden = [&](uint32_t at_once) {
    std::vector<std::vector<float>> out;
    for (uint32_t i = 0; i < sequences; i += at_once) {
      std::vector<StepItem> items;
      for (uint32_t j = i; j < i + at_once; ++j) {
        const std::vector<uint32_t> tokens(length, 1 + j % (spec.vocab_size - 1));
        items.push_back(
            {.sequence = engine->add_sequence(tokens, length, {}, false), .tokens = length, .hidden = true});
      }
      for (ItemOutput& output : engine->step(items)) out.push_back(std::move(output.hidden));
      for (const StepItem& item : items) engine->remove_sequence(item.sequence);
    }
    return out;
  };
  const auto together = hidden(sequences);
  CHECK(together == hidden(1));
  CHECK(together == hidden(45));
  CHECK(together[0] != together[1]);
}

void a_reused_prefix_changes_nothing() {
  const ModelSpec spec = random_model(3);
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  options.page_size = 4;
  const auto engine = make_engine(spec, random_parameters(spec), options);
  const std::vector<uint32_t> tokens = random_tokens(spec, 23);
  const std::vector<float> fresh = whole(*engine, tokens);
  const uint32_t id = engine->add_sequence(tokens, 1, {}, true);
  CHECK(engine->sequence_state(id).cached == 20);
  const StepItem item = want_logits(id, 3);
  const std::vector<float> logits = engine->step({&item, 1})[0].logits;
  CHECK(std::equal(logits.begin(), logits.end(), fresh.end() - static_cast<std::ptrdiff_t>(logits.size())));
}

void scores_and_samples_agree_with_logits() {
  const ModelSpec spec = random_model(2);
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  const auto engine = make_engine(spec, random_parameters(spec), options);
  const std::vector<uint32_t> tokens = random_tokens(spec, 9);
  SamplingConfig greedy;
  greedy.top_logprobs = 3;
  const uint32_t id = engine->add_sequence(tokens, 9, greedy, false);
  const StepItem item{id, 9, true, true, true, false};
  const ItemOutput out = engine->step({&item, 1})[0];
  CHECK(out.scored.size() == 8 && out.sampled.size() == 1);
  for (uint32_t row = 0; row < 9; ++row) {
    const std::span<const float> logits(out.logits.data() + row * spec.vocab_size, spec.vocab_size);
    double mass = 0;
    for (float x : logits) mass += std::exp(double(x));
    const ScoredToken& token = row < 8 ? out.scored[row] : out.sampled[0];
    CHECK(row == 8 || token.token == tokens[row + 1]);
    CHECK(std::abs(token.logprob - (logits[token.token] - std::log(mass))) < 1e-4);
    CHECK(token.top.size() == 3);
    CHECK(token.top[0].token == static_cast<uint32_t>(std::ranges::max_element(logits) - logits.begin()));
    if (row == 8) CHECK(token.token == token.top[0].token);
  }
  CHECK(engine->sequence_state(id).tokens == 10 && engine->sequence_state(id).cached == 9);
}

void bad_calls_are_refused_and_change_nothing() {
  const ModelSpec spec = random_model(3);
  const Parameters parameters = random_parameters(spec);
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  options.page_size = 4;
  options.pages = 3;
  options.max_sequences = 2;
  options.max_batch_tokens = 16;
  options.max_logit_rows = 4;
  Engine empty(spec, options);
  const uint32_t token = 1;
  const uint32_t waiting = empty.add_sequence({&token, 1}, 1, {}, true);
  const StepItem early{waiting, 1};
  test::check_throws("finish_loading", [&] { empty.step({&early, 1}); });
  test::check_throws("is missing", [&] { empty.finish_loading(); });
  const TensorSlot& slot = parameters[1].first;
  const std::vector<float>& values = parameters[1].second;
  test::check_throws("is not one of",
                     [&] { empty.load_tensor("model.nothing", DType::f32, slot.shape, bytes_of(values)); });
  const std::vector<uint64_t> wrong{7, 7};
  test::check_throws("[7, 7]", [&] { empty.load_tensor(slot.name, DType::f32, wrong, bytes_of(values)); });
  test::check_throws("bytes", [&] { empty.load_tensor(slot.name, DType::bf16, slot.shape, bytes_of(values)); });
  empty.load_tensor(slot.name, DType::f32, slot.shape, bytes_of(values));
  test::check_throws("before", [&] { empty.load_tensor(slot.name, DType::f32, slot.shape, bytes_of(values)); });

  const auto engine = make_engine(spec, parameters, options);
  const std::vector<uint32_t> tokens = random_tokens(spec, 14), outside{spec.vocab_size};
  test::check_throws("outside the embedding", [&] { engine->add_sequence(outside, 1, {}, true); });
  test::check_throws("at least one", [&] { engine->add_sequence({}, 0, {}, true); });
  test::check_throws("longer than", [&] { engine->add_sequence(random_tokens(spec, 65), 1, {}, true); });
  const uint32_t a = engine->add_sequence(tokens, 14, {}, true), b = engine->add_sequence(tokens, 14, {}, true);
  test::check_throws("are taken", [&] { engine->add_sequence(tokens, 14, {}, true); });
  auto refused = [&](const std::string& text, std::vector<StepItem> items) {
    test::check_throws(text, [&] { engine->step(items); });
    CHECK(engine->free_pages() == 3 && engine->sequence_state(a).cached == 0);
  };
  refused("at least one", {});
  refused("no sequence 9", {{9, 1}});
  refused("no token", {{a, 0}});
  refused("not cached yet", {{a, 15}});
  refused("after its last", {{a, 3, true}});
  refused("twice", {{a, 1}, {a, 1}});
  refused("tokens, the engine", {{a, 12}, {b, 12}});
  refused("rows of logits", {{a, 5, false, true}});
  refused("out_of_pages", {{a, 14}});
  const StepItem fits{a, 12};
  engine->step({&fits, 1});
  CHECK(engine->free_pages() == 0 && engine->pages_for(a, 2) == 1);
  engine->remove_sequence(a);
  engine->remove_sequence(b);
  test::check_throws("no sequence", [&] { engine->remove_sequence(a); });
  CHECK(engine->free_pages() == 3);
}

void pages_of_a_failed_sequence_are_not_reused() {
  const ModelSpec spec = random_model(1);
  Parameters parameters = random_parameters(spec);
  std::ranges::fill(parameters.back().second, NAN);  // the output embedding: every logit is NaN
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  const auto engine = make_engine(spec, parameters, options);
  const std::vector<uint32_t> tokens = random_tokens(spec, 40);
  for (int i = 0; i < 2; ++i) {
    const uint32_t id = engine->add_sequence(tokens, 40, {}, true);
    CHECK(engine->sequence_state(id).cached == 0);
    const StepItem item{id, 40, true};
    CHECK(!engine->step({&item, 1})[0].failure.empty());
    engine->remove_sequence(id);
    CHECK(engine->free_pages() == options.pages);
  }
}

// Steps launched before the ones before them are collected: the same tokens, with sequences ending and beginning, on
// the same number, in between.
void launching_ahead_changes_nothing() {
  const ModelSpec spec = random_model(3);
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  options.page_size = 3;
  options.max_sequences = 2;
  const auto engine = make_engine(spec, random_parameters(spec), options);
  const std::vector<uint32_t> prompt = random_tokens(spec, 5), other = random_tokens(spec, 4);
  SamplingConfig sampling;
  sampling.temperature = 1;
  sampling.seed = 7;
  auto alone = [&](const std::vector<uint32_t>& tokens, int count) {
    const uint32_t id = engine->add_sequence(tokens, 1, sampling, false);
    std::vector<uint32_t> out;
    for (int i = 0; i < count; ++i) {
      const StepItem item{id, i == 0 ? uint32_t(tokens.size()) : 1, true};
      out.push_back(engine->step({&item, 1})[0].sampled[0].token);
    }
    engine->remove_sequence(id);
    return out;
  };
  const std::vector<uint32_t> want = alone(prompt, 8), want_other = alone(other, 1);

  const uint32_t id = engine->add_sequence(prompt, 1, sampling, false);
  std::vector<uint32_t> got;
  auto collect = [&] { got.push_back(engine->collect()[0].sampled[0].token); };
  for (uint32_t i = 0; i < 8; ++i) {
    const StepItem item{id, i == 0 ? 5u : 1u, true};
    engine->launch({&item, 1});
    if (i > 0) collect();
  }
  test::check_throws("not collected", [&] { engine->append_tokens(id, {&prompt[0], 1}); });
  test::check_throws("not collected", [&] {
    const StepItem item{id, 1, true};
    engine->step({&item, 1});
  });
  collect();
  CHECK(got == want);
  test::check_throws("no step is launched", [&] { engine->collect(); });

  StepItem item{id, 1, true};
  engine->launch({&item, 1});
  engine->remove_sequence(id);
  const uint32_t next = engine->add_sequence(other, 1, sampling, false);
  CHECK(next == id);
  item.tokens = 4;
  engine->launch({&item, 1});
  CHECK(engine->collect()[0].sampled.empty());  // of the one that is gone
  CHECK(engine->collect()[0].sampled[0].token == want_other[0]);

  sampling.repetition_penalty = 1.5f;
  const uint32_t penalized = engine->add_sequence(prompt, 1, sampling, false);
  item = {penalized, 5, true};
  engine->launch({&item, 1});
  item.tokens = 1;
  test::check_throws("penalties", [&] { engine->launch({&item, 1}); });
  engine->collect();
  engine->launch({&item, 1});
  CHECK(engine->collect()[0].sampled.size() == 1);
  engine->remove_sequence(penalized);
  engine->remove_sequence(next);
  CHECK(engine->free_pages() == options.pages);
}

void padding_changes_nothing_but_the_work() {
  for (DType type : {DType::f32, DType::bf16}) {
    const ModelSpec spec = random_model(3);
    const Parameters parameters = random_parameters(spec);
    EngineOptions options;
    options.compute = options.weights = type;
    options.page_size = 3;
    const auto plain = make_engine(spec, parameters, options);
    options.padded = true;
    options.max_batch_tokens = 48;
    const auto padded = make_engine(spec, parameters, options);
    std::vector<std::vector<uint32_t>> prompts;
    for (uint32_t length : {1u, 2u, 13u, 9u}) prompts.push_back(random_tokens(spec, length));
    for (const auto& prompt : prompts) CHECK(whole(*padded, prompt) == whole(*plain, prompt));
    CHECK(ragged(*padded, prompts) == ragged(*plain, prompts));
    const EngineStatistics before = padded->statistics();

    std::vector<StepItem> items;
    for (const auto& prompt : prompts)
      items.push_back({padded->add_sequence(prompt, 1, {}, false), static_cast<uint32_t>(prompt.size())});
    test::check_throws("4 sequences of 13 tokens", [&] { padded->step(items); });
    items[2].tokens = 12;
    padded->step(items);
    // One is gone and keeps its row; the filling is not counted as tokens.
    padded->remove_sequence(items[0].sequence);
    const StepItem rest{items[2].sequence, 1};
    padded->step({&rest, 1});
    CHECK(padded->statistics().tokens - before.tokens == 1 + 2 + 12 + 9 + 1);
    const uint32_t late = padded->add_sequence(random_tokens(spec, 13), 1, {}, false);
    const StepItem too_long{late, 13};
    test::check_throws("4 sequences of 13 tokens", [&] { padded->step({&too_long, 1}); });
    for (size_t i = 1; i < items.size(); ++i) padded->remove_sequence(items[i].sequence);
    padded->remove_sequence(late);
    const uint32_t alone = padded->add_sequence(random_tokens(spec, 48), 1, {}, false);
    const StepItem all{alone, 48};  // nobody is left to be filled up
    padded->step({&all, 1});
  }
}

void steps_tokens_and_memory_are_counted() {
  const ModelSpec spec = random_model(1);
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  const auto engine = make_engine(spec, random_parameters(spec), options);
  const EngineStatistics fresh = engine->statistics();
  CHECK(fresh.steps == 0 && fresh.tokens == 0 && fresh.bytes_read == 0 && fresh.flops == 0);
  const MemoryBudget budget = memory_budget(spec, options);
  const uint64_t planned = budget.weights + budget.kv_cache + budget.activations + budget.logits;
  CHECK(fresh.memory >= planned && fresh.memory < planned + 4096 && fresh.peak_memory == fresh.memory);

  const uint32_t id = engine->add_sequence(random_tokens(spec, 9), 9, {}, false);
  const StepItem first{id, 6}, second{id, 3, true};
  engine->step({&first, 1});
  const EngineStatistics half = engine->statistics();
  engine->step({&second, 1});
  const EngineStatistics all = engine->statistics();
  CHECK(half.steps == 1 && half.tokens == 6 && all.steps == 2 && all.tokens == 9 && all.captured_steps == 0);
  CHECK(half.flops % 6 == 0);
  const uint64_t head = uint64_t{spec.vocab_size} * spec.hidden_size;
  const LayerSpec& last = spec.layers.back();  // of which only logits need more than keys and values
  const uint64_t rest = uint64_t{spec.hidden_size} * (last.q_width() + 3 * spec.ffn_size);
  CHECK(all.flops - half.flops == half.flops / 2 + 2 * (rest + head));
  CHECK(all.bytes_read - half.bytes_read > half.bytes_read + (rest + head) * sizeof(float));
  test::check_throws("no token", [&] {
    const StepItem none{id, 0};
    engine->step({&none, 1});
  });
  CHECK(engine->statistics().steps == 2);

  CHECK(engine->copy_bandwidth() > 1e8);
  CHECK(engine->statistics().memory == fresh.memory && engine->statistics().peak_memory == fresh.memory);
}

// A prompt of whose rows one has logits, or none, is as one of which all rows are computed to the end.
void prompts_leave_the_last_layer_early() {
  const ModelSpec spec = random_model(1);
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  const auto engine = make_engine(spec, random_parameters(spec), options);
  const std::vector<std::vector<uint32_t>> prompts = {random_tokens(spec, 60), random_tokens(spec, 60)};
  const auto sampled = [&](const std::vector<uint32_t>& chunks, bool hidden) {
    std::vector<StepItem> items;
    for (const auto& prompt : prompts) items.push_back({engine->add_sequence(prompt, 60, {}, false)});
    std::vector<ItemOutput> outputs;
    for (size_t i = 0; i < chunks.size(); ++i) {
      for (StepItem& item : items) item.tokens = chunks[i], item.sample = i + 1 == chunks.size(), item.hidden = hidden;
      outputs = engine->step(items);
    }
    for (const StepItem& item : items) engine->remove_sequence(item.sequence);
    return outputs;
  };
  const std::vector<ItemOutput> whole = sampled({60}, true);
  for (const std::vector<uint32_t>& chunks : {std::vector<uint32_t>{60}, {40, 20}, {20, 40}, {59, 1}}) {
    const std::vector<ItemOutput> early = sampled(chunks, false);
    for (size_t i = 0; i < prompts.size(); ++i) {
      const ScoredToken &got = early[i].sampled.at(0), &want = whole[i].sampled.at(0);
      CHECK(got.token == want.token && std::abs(got.logprob - want.logprob) < 1e-5f);
    }
  }
}

void bad_models_and_options_are_refused() {
  auto refused = [](const std::string& text, auto change) {
    ModelSpec spec = random_model(3);
    EngineOptions options;
    change(spec, options);
    test::check_throws(text, [&] { Engine engine(spec, options); });
  };
  refused("kv_heads", [](ModelSpec& spec, EngineOptions&) { spec.layers[1].kv_heads = 3; });
  refused("odd", [](ModelSpec& spec, EngineOptions&) { spec.layers[0].head_dim = 7; });
  refused("layers", [](ModelSpec& spec, EngineOptions&) { spec.layers.clear(); });
  refused("rope_theta", [](ModelSpec& spec, EngineOptions&) { spec.layers[0].rope_theta = NAN; });
  refused("hidden_size", [](ModelSpec& spec, EngineOptions&) { spec.hidden_size = 0; });
  refused("f16", [](ModelSpec&, EngineOptions& options) { options.compute = DType::f16; });
  refused("page_size", [](ModelSpec&, EngineOptions& options) { options.page_size = 0; });
  refused("2^32", [](ModelSpec&, EngineOptions& options) { options.page_size = options.pages = 1 << 20; });
  refused("abacus", [](ModelSpec&, EngineOptions& options) { options.device = "abacus"; });
}

// A token whose embedding is damaged takes its own sequence down, at once or with a step of it under way; the others
// generate what they do without it.
void damaged_weights_end_only_the_sequences_that_meet_them() {
  const ModelSpec spec = random_model(1);
  Parameters parameters = random_parameters(spec);
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  const uint32_t damaged = spec.vocab_size - 1;
  for (auto& [slot, values] : parameters) {
    if (slot.name.find("embed_tokens") != std::string::npos)
      std::fill_n(values.begin() + size_t{damaged} * spec.hidden_size, spec.hidden_size, NAN);
    // It is never sampled: its logit is 0, or the healthy would meet it as well.
    if (slot.name.find("lm_head") != std::string::npos)
      std::fill_n(values.begin() + size_t{damaged} * spec.hidden_size, spec.hidden_size, 0.0f);
  }
  const auto engine = make_engine(spec, parameters, options);
  const std::vector<uint32_t> healthy{1, 2, 3}, ill{1, damaged, 3};
  const auto alone = [&] {
    const uint32_t id = engine->add_sequence(healthy, 3, {}, false);
    const StepItem prompt{id, 3, true}, next{id, 1, true};
    std::vector<uint32_t> out{engine->step({&prompt, 1})[0].sampled[0].token};
    out.push_back(engine->step({&next, 1})[0].sampled[0].token);
    engine->remove_sequence(id);
    return out;
  }();

  const uint32_t one = engine->add_sequence(healthy, 3, {}, false), two = engine->add_sequence(ill, 3, {}, true);
  engine->launch(std::vector<StepItem>{{one, 3, true}, {two, 3, true}});
  engine->launch(std::vector<StepItem>{{two, 1, true}, {one, 1, true}});
  const std::vector<ItemOutput> first = engine->collect(), second = engine->collect();
  CHECK(first[0].failure.empty() && first[0].sampled[0].token == alone[0]);
  CHECK(first[1].failure.find("not finite") != std::string::npos && first[1].sampled.empty());
  CHECK(!second[0].failure.empty() && second[0].sampled.empty());
  CHECK(second[1].failure.empty() && second[1].sampled[0].token == alone[1]);
  const StepItem more{two, 1, true};
  test::check_throws("has failed and can only be removed", [&] { engine->step({&more, 1}); });
  test::check_throws("has failed and can only be removed", [&] { engine->append_tokens(two, healthy); });
  engine->remove_sequence(two);

  const uint32_t scored = engine->add_sequence(ill, 3, {}, false);
  const StepItem score{scored, 3, false, true};
  const ItemOutput out = engine->step({&score, 1})[0];
  CHECK(!out.failure.empty() && out.scored.empty());
}

}  // namespace

int main() {
  for (int family : {1, 2, 3})
    for (DType compute : {DType::f32, DType::bf16}) {
      const ModelSpec spec = random_model(family);
      cutting_changes_nothing(spec, compute);
      for (Scheme scheme : {Scheme::fp8_static, Scheme::fp8_dynamic})
        cutting_changes_nothing(in_fp8(spec, scheme, family != 2, family == 3), compute);
      cutting_changes_nothing(in_fp8(spec, Scheme::fp8_cast, family != 2, false), compute);
    }
  fp8_weights_mean_the_same_however_they_come();
  weights_quantized_for_every_product_mean_the_same_as_kept_ones();
  scales_that_cannot_be_are_refused();
  calibration_does_not_depend_on_the_batch();
  long_passes_have_the_results_of_short_ones();
  a_reused_prefix_changes_nothing();
  scores_and_samples_agree_with_logits();
  bad_calls_are_refused_and_change_nothing();
  pages_of_a_failed_sequence_are_not_reused();
  launching_ahead_changes_nothing();
  padding_changes_nothing_but_the_work();
  steps_tokens_and_memory_are_counted();
  prompts_leave_the_last_layer_early();
  bad_models_and_options_are_refused();
  damaged_weights_end_only_the_sequences_that_meet_them();
}
