// Engines on a GPU over their lives: no memory is lost, engines side by side and in threads disturb nobody, and where
// the device fails or cannot be had, errors say so. What breaks a process is done in one of its own: this program
// starts itself with the name of a part.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <thread>

#include "../check.h"
#include "core/engine.h"
#include "gpu.h"
#include "support/algorithm_cache.h"

using namespace gemma_cuda;
using std::vector;
namespace fs = std::filesystem;

namespace {

ModelSpec tiny_model() {
  ModelSpec spec;
  spec.vocab_size = 512;
  spec.hidden_size = 64;
  spec.ffn_size = 128;
  spec.max_positions = 512;
  spec.tied_embeddings = false;  // or every token would be followed by itself
  for (uint32_t i = 0; i < 3; ++i)
    spec.layers.push_back({.window = i == 1 ? 16u : 0u,
                           .heads = 4,
                           .kv_heads = 2,
                           .head_dim = 32,
                           .attention_scale = 0.2f,
                           .post_norms = true,
                           .qk_norm = true});
  return spec;
}

EngineOptions options_for(const std::string& device) {
  EngineOptions options;
  options.device = device;
  options.max_sequences = 8;
  options.max_logit_rows = 8;
  return options;
}

ModelSpec in_fp8(ModelSpec spec, Scheme scheme, bool cache) {
  for (LayerSpec& layer : spec.layers) {
    layer.qkv = layer.attention_out = layer.gate_up = layer.down = scheme;
    layer.fp8_cache = cache;
  }
  return spec;
}

// The same weights for the same number, in every process and on every device. Those in FP8 are quantized as they come.
void load(Engine& engine, uint32_t number, const ModelSpec& spec = tiny_model()) {
  std::mt19937 random(number);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  for (const TensorSlot& slot : tensor_table(spec)) {
    if (slot.part == Part::scales) continue;
    size_t count = 1;
    for (uint64_t extent : slot.shape) count *= extent;
    vector<float> values(count, 0.03f);  // a scale, where it is none of the weights
    if (slot.part == Part::values)
      for (float& x : values) x = normal(random);
    engine.load_tensor(slot.name, DType::f32, slot.shape,
                       {reinterpret_cast<const uint8_t*>(values.data()), count * sizeof(float)});
  }
  engine.finish_loading();
}

std::unique_ptr<Engine> make_engine(uint32_t weights, const std::string& device = "cuda:0") {
  auto engine = std::make_unique<Engine>(tiny_model(), options_for(device));
  load(*engine, weights);
  return engine;
}

// Some sequences of an engine, greedy and drawn ones, that are generated side by side. Steps are launched ahead.
class Generation {
 public:
  explicit Generation(Engine& engine) : engine_(engine) {
    for (uint32_t length : {1u, 7u, 33u, 64u, 100u}) {
      vector<uint32_t> prompt(length);
      for (uint32_t i = 0; i < length; ++i) prompt[i] = (length * 31 + i * 7) % 512;
      SamplingConfig sampling;
      sampling.temperature = length % 2 == 0 ? 0.0f : 1.0f;
      sampling.seed = length;
      items_.push_back({engine_.add_sequence(prompt, length, sampling, false), length, true});
    }
    tokens.resize(items_.size());
  }
  ~Generation() {
    for (const StepItem& item : items_) engine_.remove_sequence(item.sequence);
  }
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  void launch() {
    engine_.launch(items_);
    for (StepItem& item : items_) item.tokens = 1;
  }
  void collect() {
    const vector<ItemOutput> outputs = engine_.collect();
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i].push_back(outputs[i].sampled[0].token);
  }
  void step() {
    launch();
    collect();
  }

  vector<vector<uint32_t>> tokens;

 private:
  Engine& engine_;
  vector<StepItem> items_;
};

constexpr int kSteps = 20;
using Tokens = vector<vector<uint32_t>>;

Tokens generate(Engine& engine) {
  Generation generation(engine);
  generation.launch();
  for (int i = 1; i < kSteps; ++i) {
    generation.launch();
    generation.collect();
  }
  generation.collect();
  return generation.tokens;
}

// Logits of a prompt's tokens, computed all at once or one by one.
vector<float> logits_of(Engine& engine, const vector<uint32_t>& prompt, bool one_by_one) {
  const uint32_t length = static_cast<uint32_t>(prompt.size());
  const uint32_t sequence = engine.add_sequence(prompt, length, {}, false);
  vector<float> logits;
  const uint32_t at_once = one_by_one ? 1 : 8;
  for (uint32_t i = 0; i < length; i += at_once) {
    const StepItem item{.sequence = sequence, .tokens = std::min(at_once, length - i), .logits = true};
    const vector<float> more = engine.step({&item, 1})[0].logits;
    logits.insert(logits.end(), more.begin(), more.end());
  }
  engine.remove_sequence(sequence);
  return logits;
}

// A step may leave out the logits of a greedy pick, unless somebody asks for them as well.
void logits_are_there_where_they_are_asked_for() {
  const auto engine = make_engine(1);
  vector<StepItem> items;
  for (uint32_t i = 0; i < 3; ++i)
    items.push_back({engine->add_sequence(vector<uint32_t>{5 + i, 7, 11}, 3, {}, false), 3, true});
  items[1].logits = true;
  for (int step = 0; step < 3; ++step) {
    const vector<ItemOutput> outputs = engine->step(items);
    CHECK(outputs[0].logits.empty() && outputs[2].logits.empty());
    const vector<float>& logits = outputs[1].logits;
    CHECK(logits.size() == size_t{512} * items[1].tokens);
    const auto best = std::max_element(logits.end() - 512, logits.end());
    CHECK(best - (logits.end() - 512) == outputs[1].sampled[0].token);
    for (StepItem& item : items) item.tokens = 1;
  }
}

// What engines with the weights 1 and 2 generate, each alone.
struct Alone {
  Tokens one = generate(*make_engine(1)), two = generate(*make_engine(2));
};

void engines_repeat_themselves(const Alone& alone) {
  CHECK(alone.one != alone.two);
  for (const Tokens* tokens : {&alone.one, &alone.two})
    for (const vector<uint32_t>& sequence : *tokens)
      CHECK(std::ranges::any_of(sequence, [&](uint32_t token) { return token != sequence[0]; }));
  const auto engine = make_engine(1);
  for (int i = 0; i < 20; ++i) CHECK(generate(*engine) == alone.one);
}

void interleaved_engines_do_not_disturb_each_other(const Alone& alone) {
  const auto first = make_engine(1), second = make_engine(2);
  Generation one(*first), two(*second);
  one.launch();
  for (int i = 0; i < kSteps; ++i) {
    two.launch();
    one.collect();
    if (i + 1 < kSteps) one.launch();
    two.collect();
  }
  CHECK(one.tokens == alone.one && two.tokens == alone.two);
}

// They are made and dropped while others capture their steps, and run.
void engines_live_in_threads(const Alone& alone) {
  std::array<Tokens, 8> got;
  vector<std::thread> threads;
  for (size_t i = 0; i < got.size(); ++i)
    threads.emplace_back([&, i] {
      for (int life = 0; life < 4; ++life) {
        const auto engine = make_engine(1 + i % 2);
        for (int round = 0; round < 2; ++round) got[i] = generate(*engine);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < got.size(); ++i) CHECK(got[i] == (i % 2 == 0 ? alone.one : alone.two));
}

void an_engine_goes_from_thread_to_thread(const Alone& alone) {
  std::unique_ptr<Engine> engine;
  std::unique_ptr<Generation> generation;
  const auto elsewhere = [](auto work) { std::thread(work).join(); };
  elsewhere([&] { engine = make_engine(1); });
  elsewhere([&] { generation = std::make_unique<Generation>(*engine); });
  for (int i = 0; i < kSteps; ++i) {
    elsewhere([&] { generation->launch(); });
    elsewhere([&] { generation->collect(); });
  }
  CHECK(generation->tokens == alone.one);
  elsewhere([&] { generation.reset(); });
  elsewhere([&] { engine.reset(); });
}

void engines_are_dropped_with_steps_under_way(const Alone& alone) {
  const auto survivor = make_engine(2);
  for (int i = 0; i < 10; ++i) {
    const auto engine = make_engine(1);
    Generation generation(*engine);
    generation.launch();
    if (i % 2 == 1) generation.launch();
    // The sequences go first, then the engine, while the device still computes them.
  }
  CHECK(generate(*survivor) == alone.two);
}

// In FP8 an engine repeats itself, with graphs and without, and is nearer to the reference backend's engine of the same
// FP8 weights than that is to one without FP8.
void fp8_engines_repeat_themselves_and_are_near_the_reference() {
  vector<uint32_t> prompt;
  for (uint32_t i = 0; i < 40; ++i) prompt.push_back((i * i * 7 + 3) % 512);
  const auto engine_of = [](const ModelSpec& spec, const std::string& device, bool graphs) {
    EngineOptions options = options_for(device);
    options.graphs = graphs;
    auto engine = std::make_unique<Engine>(spec, options);
    load(*engine, 1, spec);
    return engine;
  };
  const vector<float> plain = logits_of(*engine_of(tiny_model(), "reference", true), prompt, false);
  for (const Scheme scheme : {Scheme::plain, Scheme::fp8_static, Scheme::fp8_dynamic, Scheme::fp8_cast})
    for (const bool cache : {false, true}) {
      const ModelSpec spec = in_fp8(tiny_model(), scheme, cache);
      const auto captured = engine_of(spec, "cuda:0", true), direct = engine_of(spec, "cuda:0", false);
      const Tokens tokens = generate(*captured);
      CHECK(generate(*direct) == tokens);
      for (int i = 0; i < 20; ++i) CHECK(generate(*captured) == tokens);
      const auto reference = engine_of(spec, "reference", true);
      const vector<float> want = logits_of(*reference, prompt, false);
      const double cost = test::relative_error(want, plain);
      for (const bool one_by_one : {false, true}) {
        const double error = test::relative_error(logits_of(*captured, prompt, one_by_one), want);
        std::printf("  scheme %d, FP8 cache %d, %s: %.3f from the reference, which is %.3f from bf16\n",
                    static_cast<int>(scheme), cache, one_by_one ? "one by one" : "at once", error, cost);
        if (scheme != Scheme::plain || cache) CHECK(error < 0.7 * cost);
      }
    }
}

// What calibration counts on the GPU: as many elements as the reference does, with maxima that bf16 can tell apart from
// the reference's by its rounding only.
void calibration_counts_as_the_reference_does() {
  vector<uint32_t> prompt;
  for (uint32_t i = 0; i < 64; ++i) prompt.push_back((i * i * 5 + 1) % 512);
  const auto gather = [&](const std::string& device) {
    const auto engine = make_engine(1, device);
    engine->start_calibration();
    logits_of(*engine, prompt, false);
    return engine->calibration();
  };
  const vector<Observation> got = gather("cuda:0"), want = gather("reference");
  CHECK(got.size() == want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    CHECK(got[i].name == want[i].name && got[i].largest.size() == want[i].largest.size());
    uint64_t counted = 0, due = 0;
    for (uint64_t n : got[i].counts) counted += n;
    for (uint64_t n : want[i].counts) due += n;
    CHECK(counted == due);
    for (size_t group = 0; group < want[i].largest.size(); ++group)
      CHECK(std::abs(got[i].largest[group] / want[i].largest[group] - 1) < 0.03);
  }
}

size_t free_memory() {
  size_t free = 0, total = 0;
  CHECK(cudaMemGetInfo(&free, &total) == cudaSuccess);
  return free;
}

// The driver takes memory in blocks of 2 MiB, loads kernels when they are first used and grows its own tables then, so
// the level counts from the second cycle, and it may move by two blocks. Of a leak of a block or more each cycle, 50
// cycles would lose 25 times that.
void device_memory_returns_to_its_level() {
  constexpr size_t kSlack = size_t{4} << 20;
  size_t level = 0;
  for (int cycle = 0; cycle < 52; ++cycle) {
    generate(*make_engine(1 + cycle % 2));
    if (cycle == 1) level = free_memory();
  }
  const size_t now = free_memory();
  std::printf("  free before and after 50 cycles: %zu and %zu bytes\n", level, now);
  CHECK(now + kSlack >= level);
}

// An engine takes what its budget says and, once it is loaded, nothing more, whatever is asked of it. The driver's own
// part (graphs, tables, rounding up to its blocks) comes on top.
void memory_is_taken_before_the_first_step() {
  constexpr size_t kDrivers = size_t{32} << 20, kBlock = size_t{2} << 20;
  const uint64_t budget = memory_budget(tiny_model(), options_for("cuda:0")).total();
  const size_t before = free_memory();
  const auto engine = make_engine(1);
  const size_t loaded = free_memory();
  std::printf("  budget %zu bytes, taken %zu\n", static_cast<size_t>(budget), before - loaded);
  CHECK(before - loaded <= budget + kDrivers);
  generate(*engine);
  SamplingConfig sampling;
  sampling.temperature = 1;
  sampling.repetition_penalty = 1.5f;
  sampling.top_logprobs = 20;
  vector<uint32_t> prompt(200);
  for (uint32_t i = 0; i < prompt.size(); ++i) prompt[i] = i;
  vector<StepItem> items;
  for (int i = 0; i < 8; ++i) items.push_back({engine->add_sequence(prompt, 1, sampling, false), 25, false});
  for (int step = 0; step < 8; ++step) {
    for (StepItem& item : items) item.sample = step == 7;
    CHECK(engine->step(items).size() == 8);
  }
  CHECK(free_memory() + kBlock >= loaded);
}

// Greedy, drawn and penalized sequences side by side, with so many log-probabilities; the step before the last looks
// its tokens up. `history` long enough, the penalties of all together have no room in a recorded pass.
vector<ScoredToken> sampled_and_scored(Engine& engine, uint32_t history, uint32_t top) {
  vector<StepItem> items;
  for (uint32_t i = 0; i < 8; ++i) {
    SamplingConfig sampling;
    sampling.temperature = i % 3 == 0 ? 0.0f : 1.0f;
    sampling.top_p = i % 2 ? 0.9f : 1.0f;
    sampling.seed = i;
    sampling.top_logprobs = i % 2 ? top : top / 2;
    if (i % 4 != 1) sampling.repetition_penalty = 1.3f, sampling.frequency_penalty = 0.1f;
    vector<uint32_t> prompt(history);
    for (uint32_t k = 0; k < history; ++k) prompt[k] = (i * 37 + k * 5) % 512;
    items.push_back({engine.add_sequence(prompt, history / 2, sampling, false), 1, false});
  }
  vector<ScoredToken> out;
  for (uint32_t fed = 0; fed < history + 8; fed += items[0].tokens) {
    const bool decodes = fed + 1 >= history;
    for (StepItem& item : items) {
      item.tokens = decodes || fed + 2 >= history ? 1 : std::min(32u, history - 2 - fed);
      item.score = fed + 2 == history;
      item.sample = decodes;
    }
    for (const ItemOutput& output : engine.step(items)) {
      CHECK(output.scored.size() == items[0].score && output.sampled.size() == items[0].sample);
      out.insert(out.end(), output.scored.begin(), output.scored.end());
      out.insert(out.end(), output.sampled.begin(), output.sampled.end());
    }
  }
  for (const StepItem& item : items) engine.remove_sequence(item.sequence);
  return out;
}

void check_same(const vector<ScoredToken>& a, const vector<ScoredToken>& b, size_t shared_top) {
  CHECK(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    CHECK(a[i].token == b[i].token && a[i].logprob == b[i].logprob);
    for (size_t k = 0; k < std::min({shared_top, a[i].top.size(), b[i].top.size()}); ++k)
      CHECK(a[i].top[k].token == b[i].top[k].token && a[i].top[k].logprob == b[i].top[k].logprob);
  }
}

// What a recorded pass holds, and what has to be done behind it (many log-probabilities, many penalties), give the same
// bits; and a step behind does not disturb those after it.
void sampling_is_the_same_within_a_pass_and_behind_it() {
  const auto engine = make_engine(1);
  for (uint32_t history : {5u, 100u}) {  // 6 * 100 penalties: more than the vocabulary's 512
    const vector<ScoredToken> within = sampled_and_scored(*engine, history, 20);
    CHECK(within.size() == 8 * 10 && within[1].top.size() == 20 && within[0].top.size() == 10);
    const vector<ScoredToken> behind = sampled_and_scored(*engine, history, 512);
    CHECK(behind[1].top.size() == 512);
    check_same(within, behind, 20);
    check_same(within, sampled_and_scored(*engine, history, 20), 20);
    check_same(within, sampled_and_scored(*engine, history, 0), 20);
  }
}

void what_cannot_be_had_is_refused() {
  const ModelSpec spec = tiny_model();
  test::check_throws("there is no device cuda:99", [&] { Engine engine(spec, options_for("cuda:99")); });
  EngineOptions options = options_for("cuda:0");
  options.page_size = 256;
  options.pages = 1u << 24;
  for (const char* part : {"the model needs", "KV cache", "are free. It fits with a KV cache of"})
    test::check_throws(part, [&] { Engine engine(spec, options); });
  options = options_for("auto");
  options.compute = options.weights = DType::f32;
  const std::string name = Engine(spec, options).device_name();
  CHECK(name.starts_with("reference") && name.find("no GPU: the CUDA backend computes in bf16") != std::string::npos);
}

// What a run of this program with these settings and the name of a part said, and whether it ended well.
struct Child {
  std::string output;
  bool ok = false;
};
Child run_part(const std::string& settings, const std::string& part) {
  const std::string self = fs::read_symlink("/proc/self/exe").string();
  FILE* pipe = popen(("env " + settings + " '" + self + "' " + part + " 2>&1").c_str(), "r");
  CHECK(pipe != nullptr);
  Child child;
  char text[4096];
  for (size_t size; (size = fread(text, 1, sizeof text, pipe)) > 0;) child.output.append(text, size);
  child.ok = pclose(pipe) == 0;
  if (!child.ok) std::fprintf(stderr, "part %s (%s) failed:\n%s", part.c_str(), settings.c_str(), child.output.c_str());
  return child;
}

// Part "fault": a kernel of one engine reads where nothing is. CUDA then refuses everything this process asks of that
// GPU; each engine there must say so, no more, and engines elsewhere must not notice.
void after_a_fault_everybody_knows() {
  const auto reference = make_engine(1, "reference");
  const Tokens before = generate(*reference);

  std::unique_ptr<Backend> backend = test::gpu();
  Backend& device = *backend;
  Engine first(tiny_model(), options_for("cuda:0"), std::move(backend));
  load(first, 1);
  const auto second = make_engine(2);
  Generation one(first), two(*second);
  for (int i = 0; i < 3; ++i) one.step();
  two.step();
  two.launch();
  device.embed({.ids = reinterpret_cast<const uint32_t*>(0x40),
                .tokens = 1,
                .table = {nullptr, DType::bf16, 512, 64},
                .scale = 1,
                .residual = nullptr});

  test::check_throws("step 4 failed on cuda:0", [&] { one.step(); });
  for (const char* part : {"this engine computes no more", "step 4 failed on cuda:0", "cudaErrorIllegalAddress"}) {
    test::check_throws(part, [&] { one.step(); });
    test::check_throws(part, [&] { first.collect(); });
    test::check_throws(part, [&] { Generation another(first); });
  }
  test::check_throws("step 2 failed on cuda:0", [&] { two.collect(); });
  test::check_throws("this engine computes no more", [&] { two.step(); });
  for (const char* part : {"the process cannot use that GPU again", "cudaErrorIllegalAddress"})
    test::check_throws(part, [&] { make_engine(1); });
  CHECK(generate(*reference) == before);
}

// Part "no-gpu", where CUDA shows none.
void without_a_gpu_the_cpu_computes() {
  test::check_throws("no NVIDIA GPU that this process may use", [] { make_engine(1); });
  const auto engine = make_engine(1, "auto");
  CHECK(engine->device_name().starts_with("reference"));
  CHECK(generate(*engine) == generate(*make_engine(1, "reference")));
}

// Part "tokens".
void print_tokens() {
  for (const vector<uint32_t>& sequence : generate(*make_engine(1)))
    for (uint32_t token : sequence) std::printf("%u ", token);
}

vector<std::string> lines_of(const fs::path& path) {
  std::ifstream in(path);
  vector<std::string> lines;
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

// Processes that share a file of algorithms compute the same. One whose algorithms cannot be is searched anew.
void algorithms_are_kept_between_processes() {
  std::string folder = (fs::temp_directory_path() / "gemma-cuda-XXXXXX").string();
  CHECK(mkdtemp(folder.data()) != nullptr);
  const fs::path file = fs::path(folder) / "algorithms";
  const std::string settings = "GEMMA_CUDA_CACHE='" + folder + "'";
  const Child first = run_part(settings, "tokens");
  const vector<std::string> found = lines_of(file);
  CHECK(first.ok && found.size() > 4);
  const Child second = run_part(settings, "tokens");
  CHECK(second.ok && second.output == first.output && lines_of(file) == found);
  CHECK(run_part("GEMMA_CUDA_CACHE=off", "tokens").ok);

  for (uint64_t word : {~uint64_t{0}, uint64_t{0x0123456789abcdef}}) {
    fs::remove(file);
    AlgorithmCache wrong(file);
    for (size_t i = 1; i < found.size(); ++i)
      wrong.keep(found[i].substr(found[i].find(' ', found[i].find(' ') + 1) + 1),
                 {word, word, word, word, word, word, word, word});
    CHECK(wrong.save() && lines_of(file).size() == found.size());
    const vector<std::string> before = lines_of(file);
    CHECK(run_part(settings, "tokens").ok);
    const vector<std::string> after = lines_of(file);
    CHECK(after.size() == before.size());
    for (size_t i = 1; i < after.size(); ++i) CHECK(after[i] != before[i]);
  }
  fs::remove_all(folder);
}

void all() {
  const auto part = [](const char* name, auto test) {
    std::printf("%s\n", name);
    std::fflush(stdout);
    test();
  };
  test::gpu();
  const Alone alone;
  part("repeated runs", [&] { engines_repeat_themselves(alone); });
  part("interleaved engines", [&] { interleaved_engines_do_not_disturb_each_other(alone); });
  part("engines in threads", [&] { engines_live_in_threads(alone); });
  part("an engine from thread to thread", [&] { an_engine_goes_from_thread_to_thread(alone); });
  part("dropped with steps under way", [&] { engines_are_dropped_with_steps_under_way(alone); });
  part("memory from the start", memory_is_taken_before_the_first_step);
  part("sampling within a pass and behind it", sampling_is_the_same_within_a_pass_and_behind_it);
  part("logits beside a pick", logits_are_there_where_they_are_asked_for);
  part("FP8", fp8_engines_repeat_themselves_and_are_near_the_reference);
  part("calibration", calibration_counts_as_the_reference_does);
  part("refusals", what_cannot_be_had_is_refused);
  part("no GPU", [] { CHECK(run_part("CUDA_VISIBLE_DEVICES=", "no-gpu").ok); });
  part("a fault", [] { CHECK(run_part("", "fault").ok); });
  part("algorithms on disk", algorithms_are_kept_between_processes);
  part("memory after 50 engines", device_memory_returns_to_its_level);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "";
  if (part == "fault")
    after_a_fault_everybody_knows();
  else if (part == "no-gpu")
    without_a_gpu_the_cpu_computes();
  else if (part == "tokens")
    print_tokens();
  else
    all();
}
