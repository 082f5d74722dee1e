#include "core/engine.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <unordered_set>

#include "core/calibration.h"
#include "core/cost.h"
#include "core/device.h"
#include "core/error.h"
#include "core/forward.h"
#include "core/memory.h"
#include "core/pages.h"
#include "core/plan.h"
#include "core/sample_plan.h"
#include "core/sequence.h"
#include "core/weights.h"
#include "ops/backend.h"

namespace gemma_cuda {
namespace {

void require(bool ok, const std::string& what) {
  if (!ok) throw Error::invalid_argument(what);
}

std::string number(uint64_t value) { return std::to_string(value); }

void validate(const EngineOptions& options) {
  require(options.compute != DType::f16, "f16 activations are refused: Gemma overflows in them; use bf16 or f32");
  require(options.weights != DType::f16, "f16 weights are converted on load; keep them as bf16 or f32");
  require(options.compute != DType::e4m3 && options.weights != DType::e4m3,
          "compute and weights are bf16 or f32; what is FP8 stands in the model's layers");
  require(options.compute == DType::f32 || options.weights == DType::bf16, "bf16 compute keeps its weights as bf16");
  const std::pair<const char*, uint32_t> counts[] = {{"page_size", options.page_size},
                                                     {"pages", options.pages},
                                                     {"max_batch_tokens", options.max_batch_tokens},
                                                     {"max_sequences", options.max_sequences},
                                                     {"max_logit_rows", options.max_logit_rows}};
  for (const auto& [name, value] : counts)
    require(value >= 1 && value <= (1u << 24), std::string(name) + " is " + number(value) + ", outside 1..16777216");
  // Token slots are 32-bit numbers.
  require(uint64_t{options.page_size} * options.pages <= (uint64_t{1} << 32),
          "a KV cache of " + number(options.pages) + " pages of " + number(options.page_size) +
              " tokens is more than 2^32 tokens");
}

ForwardLimits limits(const EngineOptions& options) {
  return {options.compute,       options.page_size,      options.pages, options.max_batch_tokens,
          options.max_sequences, options.max_logit_rows, options.graphs};
}

uint64_t last_token_bytes(const EngineOptions& options) { return options.max_sequences * sizeof(uint32_t); }

}  // namespace

MemoryBudget memory_budget(const ModelSpec& spec, const EngineOptions& options) {
  validate(spec);
  validate(options);
  return {Weights::bytes(spec, options.weights), Forward::kv_cache_bytes(spec, limits(options)),
          Forward::activation_bytes(spec, limits(options)) + last_token_bytes(options),
          Forward::logit_bytes(spec, limits(options)), workspace_bytes(spec, options)};
}

uint64_t MemoryBudget::total() const {
  uint64_t sum = 0;
  for (uint64_t part : {weights, kv_cache, activations, logits, workspace})
    sum = sum > UINT64_MAX - part ? UINT64_MAX : sum + part;
  return sum;
}

// A step whose results have not been collected.
struct Engine::Launched {
  struct Item {
    StepItem item;
    uint64_t serial;  // of its sequence
    uint32_t cached;  // tokens of its sequence in the cache after the step
    uint32_t scores = 0;
  };
  uint64_t number = 0;  // counted from 1
  std::vector<Item> items;
  std::vector<ItemOutput> outputs;  // all but the tokens that are sampled or scored
};

namespace {

// The device, with room for everything and the operations' own part taken.
Device reserved(Device device, const ModelSpec& spec, const EngineOptions& options) {
  require_room(spec, options, *device.backend);
  device.backend->reserve(work_limits(spec, options));
  return device;
}

}  // namespace

struct Engine::State {
  State(ModelSpec model, EngineOptions chosen, Device on)
      : spec(std::move(model)),
        options(std::move(chosen)),
        device(reserved(std::move(on), spec, options)),
        backend(device.backend.get()),
        weights(*backend, spec, options.weights),
        forward(*backend, spec, weights, limits(options)),
        cost(spec, options.weights, options.compute),
        pages(options.pages, options.page_size, options.prefix_cache),
        sequences(options.max_sequences),
        last_tokens(*backend, last_token_bytes(options)) {}

  Sequence& sequence(uint32_t id) {
    require(id < sequences.size() && sequences[id].has_value(), "there is no sequence " + number(id));
    return *sequences[id];
  }
  // The one an item of a launched step meant, if it is still there.
  Sequence* sequence(const Launched::Item& item) {
    std::optional<Sequence>& found = sequences[item.item.sequence];
    return found.has_value() && found->serial == item.serial ? &*found : nullptr;
  }
  void require_tokens(std::span<const uint32_t> tokens) const {
    for (uint32_t token : tokens)
      require(token < spec.vocab_size,
              "token id " + number(token) + " is outside the embedding's " + number(spec.vocab_size) + " rows");
  }
  uint32_t new_pages(const Sequence& sequence, uint32_t tokens) const {
    const uint32_t size = pages.page_size();
    return static_cast<uint32_t>((uint64_t{sequence.cached} + tokens + size - 1) / size - sequence.pages.size());
  }

  // Throws on the error at hand. One of the device ends the engine, and names the steps it may have come from: a fault
  // of a kernel shows at whatever call comes next.
  [[noreturn]] void step_failed(uint64_t first, uint64_t last) {
    try {
      throw;
    } catch (const Error& error) {
      if (error.kind() != Error::Kind::device) throw;
      fault = "step " + number(first) + (last > first ? " or " + number(last) : "") + " failed on " + backend->name() +
              ": " + error.message();
      launched.clear();
      throw Error::device(fault);
    }
  }
  void require_working() const {
    if (!fault.empty()) throw Error::device("this engine computes no more, make a new one: " + fault);
  }

  void count(const BatchPlan& plan, bool captured) {
    const PassCost pass = cost.of(plan);
    ++statistics.steps;
    statistics.captured_steps += captured;
    statistics.tokens += plan.cu_seqlens.back();
    statistics.bytes_read += pass.bytes;
    statistics.flops += pass.flops;
  }

  // Pages taken for a step that failed.
  void give_back_unused(Sequence& sequence) {
    const uint32_t used = (sequence.cached + pages.page_size() - 1) / pages.page_size();
    pages.release(std::span(sequence.pages).subspan(used));
    sequence.pages.resize(used);
  }

  ModelSpec spec;
  EngineOptions options;
  Device device;
  Backend* backend;
  Weights weights;
  Forward forward;
  std::optional<Calibration> calibration;
  CostModel cost;
  EngineStatistics statistics;  // all but its memory
  PagePool pages;
  std::vector<std::optional<Sequence>> sequences;
  Buffer last_tokens;  // of each sequence's number, written by the sampler
  std::deque<Launched> launched;
  uint64_t steps = 0;  // launched so far
  uint32_t batch = 0;  // most sequences in a step since there was none; only where steps are padded
  uint64_t serials = 0;
  bool ready = false;
  std::string fault;  // of the device; then the engine has ended
};

namespace {

// How many of an item's last rows need logits.
uint32_t logit_rows(const StepItem& item) { return item.logits || item.score ? item.tokens : item.sample ? 1 : 0; }

}  // namespace

Engine::Engine(ModelSpec spec, EngineOptions options) {
  gemma_cuda::validate(spec);
  validate(options);
  Device device = make_device(spec, options);
  state_ = std::make_unique<State>(std::move(spec), std::move(options), std::move(device));
}
Engine::Engine(ModelSpec spec, EngineOptions options, std::unique_ptr<Backend> backend) {
  gemma_cuda::validate(spec);
  validate(options);
  state_ = std::make_unique<State>(std::move(spec), std::move(options), Device{std::move(backend), {}});
}
Engine::~Engine() = default;

std::string Engine::device_name() const {
  const Device& device = state_->device;
  return device.backend->name() + (device.why.empty() ? "" : "; no GPU: " + device.why);
}

void Engine::load_tensor(std::string_view name, DType dtype, std::span<const uint64_t> shape,
                         std::span<const uint8_t> bytes) {
  state_->weights.load(name, dtype, shape, bytes);
}

void Engine::load_random(uint64_t seed) { state_->weights.load_random(seed); }

void Engine::finish_loading() {
  state_->weights.finish();
  if (const uint64_t bytes = state_->weights.packed_lm_head_bytes(); bytes > 0) state_->cost.lm_head_is(bytes);
  state_->forward.warm_up(state_->last_tokens.as<uint32_t>());
  state_->ready = true;
}

uint32_t Engine::add_sequence(std::span<const uint32_t> tokens, uint32_t prompt_tokens, const SamplingConfig& sampling,
                              bool reuse_prefix) {
  State& s = *state_;
  s.require_working();
  require(!tokens.empty(), "a sequence needs at least one token");
  require(
      tokens.size() <= s.spec.max_positions,
      "a sequence of " + number(tokens.size()) + " tokens is longer than the model's " + number(s.spec.max_positions));
  require(prompt_tokens <= tokens.size(), number(prompt_tokens) + " prompt tokens of " + number(tokens.size()));
  s.require_tokens(tokens);
  s.require_tokens(sampling.stop_tokens);
  for (const TokenBias& bias : sampling.logit_bias) s.require_tokens({&bias.token, 1});
  const auto slot = std::ranges::find_if(s.sequences, [](const auto& sequence) { return !sequence.has_value(); });
  require(slot != s.sequences.end(), "all " + number(s.sequences.size()) + " sequences are taken");

  Sequence sequence;
  sequence.tokens.assign(tokens.begin(), tokens.end());
  sequence.prompt_tokens = prompt_tokens;
  sequence.sampling = sampling;
  sequence.sampling.top_logprobs = std::min(sampling.top_logprobs, s.spec.vocab_size);
  if (reuse_prefix) sequence.pages = s.pages.take_prefix(tokens, sequence.chain);
  sequence.published = static_cast<uint32_t>(sequence.pages.size());
  sequence.cached = sequence.published * s.pages.page_size();
  sequence.serial = ++s.serials;
  *slot = std::move(sequence);
  return static_cast<uint32_t>(slot - s.sequences.begin());
}

uint32_t Engine::fork_sequence(uint32_t id, const SamplingConfig& sampling) {
  const Sequence& sequence = state_->sequence(id);
  require(!sequence.pending(), "sequence " + number(id) + " has a token that is not collected yet");
  const std::vector<uint32_t> tokens = sequence.tokens;
  return add_sequence(tokens, sequence.prompt_tokens, sampling, true);
}

void Engine::append_tokens(uint32_t id, std::span<const uint32_t> tokens) {
  Sequence& sequence = state_->sequence(id);
  state_->require_tokens(tokens);
  require(!sequence.failed, "sequence " + number(id) + " has failed and can only be removed");
  require(!sequence.pending(), "sequence " + number(id) + " has a token that is not collected yet");
  require(sequence.tokens.size() + tokens.size() <= state_->spec.max_positions,
          number(sequence.tokens.size()) + " + " + number(tokens.size()) + " tokens are more than the model's " +
              number(state_->spec.max_positions));
  sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
}

void Engine::remove_sequence(uint32_t id) {
  state_->pages.release(state_->sequence(id).pages);
  state_->sequences[id].reset();
  if (std::ranges::none_of(state_->sequences, &std::optional<Sequence>::has_value)) state_->batch = 0;
}

SequenceState Engine::sequence_state(uint32_t id) const {
  const Sequence& sequence = state_->sequence(id);
  return {sequence.length(), sequence.cached};
}

uint32_t Engine::free_pages() const { return state_->pages.free(); }

uint32_t Engine::pages_for(uint32_t id, uint32_t tokens) const {
  return state_->new_pages(state_->sequence(id), tokens);
}

namespace {

// Everything that can be wrong with a step, before anything is changed.
void validate_item(const StepItem& item, const Sequence& sequence, const ModelSpec& spec) {
  const std::string who = "sequence " + number(item.sequence);
  require(!sequence.failed, who + " has failed and can only be removed");
  require(item.tokens >= 1, who + " is to be fed no token");
  require(item.tokens <= sequence.length() - sequence.cached,
          who + " is to be fed " + number(item.tokens) + " tokens but has " +
              number(sequence.length() - sequence.cached) + " that are not cached yet");
  require(uint64_t{sequence.cached} + item.tokens <= spec.max_positions,
          who + " is at the model's longest length, " + number(spec.max_positions) + " tokens");
  require(!item.sample || sequence.cached + item.tokens == sequence.length(),
          who + " can be sampled only after its last known token");
  require(!item.sample || !sequence.sampling.looks_back() || !sequence.pending(),
          who + " has penalties and a token that is not collected yet");
  require(!item.score || !sequence.pending(), who + " cannot be scored before its last token is collected");
}

void require_within(const char* what, uint64_t wanted, uint64_t most) {
  require(wanted <= most, "the step has " + number(wanted) + " " + what + ", the engine was built for " + number(most));
}

// [layers + 1][t, hidden] of a pass -> [layers + 1, tokens, hidden] of the rows from `begin`.
std::vector<float> rows_of(const std::vector<std::vector<float>>& hidden, uint32_t begin, uint32_t rows,
                           uint32_t width) {
  std::vector<float> out;
  for (const std::vector<float>& layer : hidden) {
    const auto first = layer.begin() + size_t{begin} * width;
    out.insert(out.end(), first, first + size_t{rows} * width);
  }
  return out;
}

}  // namespace

std::vector<ItemOutput> Engine::step(std::span<const StepItem> items) {
  state_->require_working();
  require(state_->launched.empty(), "a launched step is not collected yet");
  launch(items);
  return collect();
}

uint32_t Engine::launched() const { return static_cast<uint32_t>(state_->launched.size()); }

bool Engine::runs_ahead() const { return state_->backend->asynchronous(); }

EngineStatistics Engine::statistics() const {
  EngineStatistics statistics = state_->statistics;
  const MemoryUse memory = state_->backend->memory();
  statistics.memory = memory.now;
  statistics.peak_memory = memory.peak;
  return statistics;
}

void Engine::start_calibration() {
  State& s = *state_;
  s.require_working();
  require(!uses_fp8(s.spec), "this model is in FP8 already; calibration needs the one it was made of");
  require(!s.options.padded, "calibration wants no padding");
  s.calibration.emplace(*s.backend, s.spec);
  s.forward.observe(&*s.calibration);
}

void Engine::stop_calibration() { state_->forward.observe(nullptr); }

std::vector<Observation> Engine::calibration() const {
  state_->require_working();
  require(state_->calibration.has_value(), "start_calibration has not been called");
  return state_->calibration->download();
}

double Engine::copy_bandwidth() { return state_->backend->copy_bandwidth(); }

void Engine::launch(std::span<const StepItem> items) {
  State& s = *state_;
  s.require_working();
  require(s.ready, "finish_loading has not been called");
  require(!items.empty(), "a step needs at least one sequence");
  require(s.launched.size() < kMaxAhead, number(kMaxAhead) + " steps are launched and not collected already");
  uint64_t tokens = 0, rows = 0, new_pages = 0, longest = 0;
  std::unordered_set<uint32_t> seen;
  for (const StepItem& item : items) {
    const Sequence& sequence = s.sequence(item.sequence);
    require(seen.insert(item.sequence).second, "sequence " + number(item.sequence) + " is twice in the step");
    validate_item(item, sequence, s.spec);
    tokens += item.tokens;
    longest = std::max<uint64_t>(longest, item.tokens);
    rows += logit_rows(item);
    new_pages += s.new_pages(sequence, item.tokens);
  }
  require_within("tokens", tokens, s.options.max_batch_tokens);
  const uint32_t batch = s.options.padded ? std::max(s.batch, static_cast<uint32_t>(items.size())) : 0;
  require(batch * longest <= s.options.max_batch_tokens, "the padded step has " + number(batch) + " sequences of " +
                                                             number(longest) + " tokens, the engine was built for " +
                                                             number(s.options.max_batch_tokens) + " tokens in all");
  require_within("rows of logits", rows, s.options.max_logit_rows);
  if (new_pages > s.pages.free())
    throw Error::out_of_pages("the step needs " + number(new_pages) + " pages of the KV cache, " +
                              number(s.pages.free()) + " of " + number(s.pages.pages()) + " are free");

  Launched step;
  step.number = s.steps + 1;
  std::vector<PlanItem> plan_items;
  for (const StepItem& item : items) {
    Sequence& sequence = s.sequence(item.sequence);
    for (uint32_t n = s.new_pages(sequence, item.tokens); n > 0; --n) sequence.pages.push_back(s.pages.take());
    plan_items.push_back({&sequence, item.tokens, logit_rows(item)});
    step.items.push_back({item, sequence.serial, sequence.cached + item.tokens});
  }
  try {
    BatchPlan plan = make_plan(plan_items, s.pages.page_size());
    if (s.options.padded) plan = pad(plan, batch);
    const bool keep_hidden = std::ranges::any_of(items, &StepItem::hidden);
    std::vector<std::vector<float>> hidden;
    const float* logits =
        s.forward.run(plan, plan_samples(step), s.last_tokens.as<uint32_t>(), keep_hidden ? &hidden : nullptr);
    copy_out(step, plan, logits, hidden);
    s.count(plan, !keep_hidden && s.forward.is_captured(plan));
  } catch (...) {
    for (const StepItem& item : items) s.give_back_unused(s.sequence(item.sequence));
    s.step_failed(s.launched.empty() ? step.number : s.launched.front().number, step.number);
  }
  s.steps = step.number;
  advance(step);
  s.batch = batch;
  s.launched.push_back(std::move(step));
}

// What the items ask of their rows of logits: first an item's scores, then its sampled token.
SamplePlan Engine::plan_samples(Launched& step) {
  SamplePlan samples;
  uint32_t row = 0;
  for (Launched::Item& launched : step.items) {
    const StepItem& item = launched.item;
    const Sequence& sequence = state_->sequence(item.sequence);
    const uint32_t next = sequence.cached + 1;
    if (item.score) launched.scores = std::min(item.tokens, sequence.length() - next);
    for (uint32_t i = 0; i < launched.scores; ++i)
      samples.score(row + i, sequence.tokens[next + i], sequence.sampling.top_logprobs);
    row += logit_rows(item);
    if (item.sample)
      samples.pick(row - 1, item.sequence, sequence.sampling, sequence.tokens, sequence.prompt_tokens, item.logits);
  }
  return samples;
}

// Logits and hidden states that the items ask for.
void Engine::copy_out(Launched& step, const BatchPlan& plan, const float* logits,
                      const std::vector<std::vector<float>>& hidden) {
  State& s = *state_;
  const uint32_t vocab = s.spec.vocab_size;
  uint32_t row = 0;
  for (size_t i = 0; i < step.items.size(); ++i) {
    const StepItem& item = step.items[i].item;
    ItemOutput& output = step.outputs.emplace_back();
    output.sequence = item.sequence;
    if (item.logits) {
      output.logits.resize(size_t{item.tokens} * vocab);
      s.backend->download(output.logits.data(), logits + size_t{row} * vocab, output.logits.size() * sizeof(float));
    }
    if (item.hidden) output.hidden = rows_of(hidden, plan.cu_seqlens[i], item.tokens, s.spec.hidden_size);
    row += logit_rows(item);
  }
}

// What is known of the sequences once the step is on its way.
void Engine::advance(const Launched& step) {
  for (const auto& [item, serial, cached, scores] : step.items) {
    Sequence& sequence = state_->sequence(item.sequence);
    sequence.cached = cached;
    if (item.sample) sequence.tokens.push_back(kPendingToken + item.sequence);
  }
}

std::vector<ItemOutput> Engine::collect() {
  State& s = *state_;
  s.require_working();
  require(!s.launched.empty(), "no step is launched");
  Launched step = std::move(s.launched.front());
  s.launched.pop_front();
  std::vector<std::optional<ScoredToken>> results;
  try {
    results = s.backend->finish_results();
  } catch (...) {
    s.step_failed(step.number, s.steps);
  }
  const uint32_t size = s.pages.page_size();
  std::span<const std::optional<ScoredToken>> left = results;
  for (size_t i = 0; i < step.items.size(); ++i) {
    const Launched::Item& item = step.items[i];
    const auto own = left.first(item.scores + item.item.sample);
    left = left.subspan(own.size());
    Sequence* sequence = s.sequence(item);
    if (sequence == nullptr) continue;
    ItemOutput& output = step.outputs[i];
    sequence->failed |= std::ranges::any_of(own, [](const auto& result) { return !result.has_value(); });
    if (sequence->failed) {
      output.failure = "the model's logits are not finite; `gemma-cuda inspect --check` finds damaged weights";
      continue;
    }
    for (const auto& result : own.first(item.scores)) output.scored.push_back(*result);
    if (item.item.sample) {
      output.sampled.push_back(*own.back());
      sequence->tokens[item.cached] = own.back()->token;  // the pending one that follows what the step fed
    }
    for (; (sequence->published + 1) * size <= item.cached; ++sequence->published)
      sequence->chain = s.pages.publish(sequence->pages[sequence->published], sequence->chain,
                                        std::span(sequence->tokens).subspan(size_t{sequence->published} * size, size));
  }
  return std::move(step.outputs);
}

}  // namespace gemma_cuda
