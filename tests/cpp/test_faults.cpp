// What an engine does when its device fails: at the launch of a step, while it computes, while steps are recorded, or
// for want of memory. The device is the reference backend with faults put in.
#include <algorithm>
#include <memory>

#include "check.h"
#include "core/engine.h"
#include "core/memory.h"
#include "ops/backend.h"

using namespace gemma_cuda;

namespace {

// What is to go wrong next.
struct Faults {
  bool launch = false, collect = false, capture = false;
  std::optional<uint64_t> free{};
  uint64_t packed_bytes = 0;  // of any matrix; 0: it packs none
  bool packs = true;
};

class FaultyBackend final : public Backend {
 public:
  explicit FaultyBackend(Faults& faults) : faults_(faults), real_(make_reference_backend(1, DType::f32)) {}

  std::string name() const override { return "faulty:0"; }
  std::optional<uint64_t> free_memory() const override { return faults_.free; }
  uint64_t workspace_bytes(const WorkLimits& limits) const override { return uint64_t{limits.logit_rows} << 20; }
  void reserve(const WorkLimits&) override {}
  void* allocate(size_t bytes) override { return real_->allocate(bytes); }
  void release(void* memory, size_t bytes) noexcept override { real_->release(memory, bytes); }
  MemoryUse memory() const override { return real_->memory(); }
  double copy_bandwidth() override { return real_->copy_bandwidth(); }
  void upload(void* to, const void* host, size_t bytes) override { real_->upload(to, host, bytes); }
  void download(void* host, const void* from, size_t bytes) override { real_->download(host, from, bytes); }
  void upload_as(void* to, DType to_type, const void* host, DType host_type, size_t count) override {
    real_->upload_as(to, to_type, host, host_type, count);
  }
  void fill_random(void* to, DType type, size_t count, uint64_t seed, float deviation) override {
    real_->fill_random(to, type, count, seed, deviation);
  }
  std::unique_ptr<Graph> capture(const std::function<void()>&) override {
    fail_if(faults_.capture, "recording");
    return nullptr;
  }
  uint64_t packed_bytes(const Matrix&) const override { return faults_.packed_bytes; }
  bool pack(const Matrix&, void*) override { return faults_.packs; }
  bool captures() const override { return faults_.capture; }
  void tune(bool) override {}
  bool asynchronous() const override { return true; }
  void embed(const EmbedArgs& args) override { real_->embed(args); }
  void gather_rows(const GatherArgs& args) override { real_->gather_rows(args); }
  void norm(const NormArgs& args) override { real_->norm(args); }
  void gemm(const GemmArgs& args) override { real_->gemm(args); }
  void rope(const RopeArgs& args) override {
    if (!captures()) real_->rope(args);  // here and below: it knows no rows that only fill up a recorded batch
  }
  void attention(const AttentionArgs& args) override {
    fail_if(faults_.launch, "a launch");
    if (!captures()) real_->attention(args);
  }
  void geglu(const GegluArgs& args) override { real_->geglu(args); }
  void soft_cap(const SoftCapArgs& args) override { real_->soft_cap(args); }
  void quantize(const QuantizeArgs& args) override { real_->quantize(args); }
  void observe(const ObserveArgs& args) override { real_->observe(args); }
  void observe_cache(const ObserveCacheArgs& args) override { real_->observe_cache(args); }
  void sample(const SampleArgs& args) override { real_->sample(args); }
  void start_results(uint32_t count, uint32_t max_top) override { real_->start_results(count, max_top); }
  std::vector<std::optional<ScoredToken>> finish_results() override {
    fail_if(faults_.collect, "a kernel");
    return real_->finish_results();
  }

 private:
  static void fail_if(bool fails, const char* what) {
    if (fails) throw Error::device(std::string(what) + " ran into a wall");
  }
  Faults& faults_;
  std::unique_ptr<Backend> real_;
};

ModelSpec tiny_model() {
  ModelSpec spec;
  spec.vocab_size = 64;
  spec.hidden_size = 32;
  spec.ffn_size = 64;
  spec.max_positions = 1024;
  spec.layers.resize(2, LayerSpec{.heads = 2, .kv_heads = 1, .head_dim = 16, .attention_scale = 0.25f});
  return spec;
}

EngineOptions tiny_options() {
  EngineOptions options;
  options.compute = options.weights = DType::f32;
  options.max_sequences = 4;
  options.max_logit_rows = 4;
  return options;
}

std::unique_ptr<Engine> make_engine(Faults& faults) {
  auto engine = std::make_unique<Engine>(tiny_model(), tiny_options(), std::make_unique<FaultyBackend>(faults));
  engine->load_random(1);
  engine->finish_loading();
  return engine;
}

// An output embedding is packed where memory is left and its numbers can be; else all is as without.
void packing_is_for_what_memory_is_left() {
  constexpr uint64_t kBytes = 1000, kLeft = uint64_t{1} << 30;
  const auto memory = [](Faults faults) { return make_engine(faults)->statistics().memory; };
  const uint64_t plain = memory({});
  CHECK(memory({.free = kLeft + kBytes, .packed_bytes = kBytes}) == plain + kBytes);
  CHECK(memory({.packed_bytes = kBytes}) == plain + kBytes);
  CHECK(memory({.free = kLeft + kBytes - 1, .packed_bytes = kBytes}) == plain);
  CHECK(memory({.packed_bytes = kBytes, .packs = false}) == plain);
}

constexpr uint32_t kPrompt[] = {5, 6, 7};

// Every call that computes says what happened; what only counts still works.
void check_ended(Engine& engine, uint32_t sequence, const std::string& fault) {
  const StepItem item{sequence, 1, true};
  for (int i = 0; i < 2; ++i) {
    test::check_throws(fault, [&] { engine.step({&item, 1}); });
    test::check_throws(fault, [&] { engine.launch({&item, 1}); });
    test::check_throws(fault, [&] { engine.collect(); });
    test::check_throws("make a new one", [&] { engine.add_sequence(kPrompt, 3, {}, false); });
  }
  engine.remove_sequence(sequence);
  CHECK(engine.free_pages() == tiny_options().pages);
}

void a_fault_at_launch_names_the_step() {
  Faults faults;
  const auto engine = make_engine(faults);
  const uint32_t id = engine->add_sequence(kPrompt, 3, {}, false);
  StepItem item{id, 3, true};
  engine->step({&item, 1});
  item.tokens = 1;
  engine->step({&item, 1});
  item.tokens = 9;
  test::check_throws("not cached yet", [&] { engine->step({&item, 1}); });  // refused, so not a step
  item.tokens = 1;
  const uint32_t other = engine->add_sequence(kPrompt, 3, {}, false), free = engine->free_pages();
  const StepItem both[] = {item, {other, 3, true}};
  faults.launch = true;
  test::check_throws("device: step 3 failed on faulty:0: a launch ran into a wall", [&] { engine->step(both); });
  CHECK(engine->sequence_state(id).cached == 4 && engine->sequence_state(other).cached == 0);
  CHECK(engine->free_pages() == free && engine->pages_for(other, 3) == 1);
  engine->remove_sequence(other);
  faults.launch = false;
  check_ended(*engine, id, "step 3 failed on faulty:0");
}

void a_fault_while_computing_names_the_steps_under_way() {
  Faults faults;
  const auto engine = make_engine(faults);
  const uint32_t id = engine->add_sequence(kPrompt, 3, {}, false);
  StepItem item{id, 3, true};
  engine->launch({&item, 1});
  faults.collect = true;
  test::check_throws("step 1 failed on faulty:0: a kernel ran into a wall", [&] { engine->collect(); });
  faults.collect = false;
  check_ended(*engine, id, "step 1 failed");

  const auto other = make_engine(faults);
  const uint32_t ahead = other->add_sequence(kPrompt, 3, {}, false);
  item = {ahead, 3, true};
  other->launch({&item, 1});
  item.tokens = 1;
  other->launch({&item, 1});
  faults.collect = true;
  test::check_throws("step 1 or 2 failed", [&] { other->collect(); });
  faults.collect = false;
  check_ended(*other, ahead, "step 1 or 2 failed");
}

void a_fault_while_recording_is_an_error() {
  Faults faults;
  faults.capture = true;
  Engine engine(tiny_model(), tiny_options(), std::make_unique<FaultyBackend>(faults));
  engine.load_random(1);
  test::check_throws("recording ran into a wall", [&] { engine.finish_loading(); });
  const uint32_t id = engine.add_sequence(kPrompt, 3, {}, false);
  const StepItem item{id, 3, true};
  test::check_throws("finish_loading", [&] { engine.step({&item, 1}); });
}

// The numbers an error names, followed, do fit.
void too_little_memory_says_what_fits() {
  const ModelSpec spec = tiny_model();
  EngineOptions options = tiny_options();
  options.pages = 1000;
  Faults faults;
  FaultyBackend backend(faults);
  MemoryBudget budget = memory_budget(spec, options);
  budget.workspace = backend.workspace_bytes(work_limits(spec, options));
  const uint64_t page = budget.kv_cache / options.pages;

  faults.free = budget.total();
  require_room(spec, options, backend);
  faults.free = budget.total() - 1;
  const auto refused = [&](const std::string& text) {
    test::check_throws(text, [&] { require_room(spec, options, backend); });
  };
  refused("on faulty:0: weights");
  refused("It fits with a KV cache of 31968 tokens instead of 32000");
  faults.free = budget.total() - 900 * page;
  refused("It fits with a KV cache of 3200 tokens instead of 32000");
  options.pages = 100;
  require_room(spec, options, backend);

  faults.free = *faults.free - 97 * page;  // three pages are left: not one a sequence
  refused("It fits with max_sequences 2 instead of 4, max_batch_tokens 128 instead of 256, max_logit_rows 2 instead");
  options.max_sequences = options.max_logit_rows = 2;
  options.max_batch_tokens = 128;
  require_room(spec, options, backend);
  faults.free = uint64_t{1} << 20;
  refused("One sequence at a time needs 1.");
  faults.free.reset();
  require_room(spec, options, backend);
}

}  // namespace

int main() {
  packing_is_for_what_memory_is_left();
  a_fault_at_launch_names_the_step();
  a_fault_while_computing_names_the_steps_under_way();
  a_fault_while_recording_is_an_error();
  too_little_memory_says_what_fits();
}
