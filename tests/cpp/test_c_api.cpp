// The C API where it is called wrongly: every call answers with a code and a sentence, and nothing has changed. What it
// computes is tested by the hosts in examples/ and from Rust. Runs on GEMMA_CUDA_TEST_DEVICE, if that is set.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "gemma_cuda.h"

using std::vector;

namespace {

constexpr const char* kConfig = R"({"model_type": "gemma3_text", "vocab_size": 96, "hidden_size": 64,
  "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
  "sliding_window": 8, "sliding_window_pattern": 2, "max_position_embeddings": 256})";

// The call fails with this code, and its sentence holds `text`.
void refused(gemma_cuda_status got, gemma_cuda_status code, const gemma_cuda_engine* engine, const std::string& text) {
  const std::string said = gemma_cuda_last_error(engine);
  if (got == code && said.find(text) != std::string::npos) return;
  std::fprintf(stderr, "got %d '%s', expected %d '%s'\n", got, said.c_str(), code, text.c_str());
  std::exit(1);
}
void refused(gemma_cuda_status got, const gemma_cuda_engine* engine, const std::string& text) {
  refused(got, GEMMA_CUDA_INVALID_ARGUMENT, engine, text);
}

struct Model {
  gemma_cuda_model* model = nullptr;
  Model() { CHECK(gemma_cuda_model_parse(kConfig, std::strlen(kConfig), &model) == GEMMA_CUDA_OK); }
  ~Model() { gemma_cuda_model_free(model); }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
};

gemma_cuda_options options() {
  gemma_cuda_options out;
  gemma_cuda_options_init(&out);
  const char* device = std::getenv("GEMMA_CUDA_TEST_DEVICE");
  out.device = device != nullptr ? device : "reference";
  out.page_size = 4;
  out.pages = 40;
  out.threads = 2;
  out.max_sequences = 4;
  return out;
}

struct Engine {
  gemma_cuda_engine* engine = nullptr;
  explicit Engine(const gemma_cuda_options& chosen = options()) {
    const Model model;
    CHECK(gemma_cuda_engine_create(model.model, &chosen, &engine) == GEMMA_CUDA_OK);
  }
  ~Engine() { gemma_cuda_engine_destroy(engine); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  void load() const {
    CHECK(gemma_cuda_load_random(engine, 1) == GEMMA_CUDA_OK);
    CHECK(gemma_cuda_finish_loading(engine) == GEMMA_CUDA_OK);
  }
  uint32_t add(const vector<uint32_t>& tokens) const {
    uint32_t sequence = 99;
    CHECK(gemma_cuda_add_sequence(engine, tokens.data(), tokens.size(), tokens.size(), nullptr, 1, &sequence) ==
          GEMMA_CUDA_OK);
    return sequence;
  }
  gemma_cuda_output step(gemma_cuda_item item) const {
    CHECK(gemma_cuda_step(engine, &item, 1) == GEMMA_CUDA_OK);
    gemma_cuda_output output;
    gemma_cuda_output_init(&output);
    CHECK(gemma_cuda_get_output(engine, 0, &output) == GEMMA_CUDA_OK);
    return output;
  }
  vector<uint32_t> state(uint32_t sequence) const {
    vector<uint32_t> out(2);
    CHECK(gemma_cuda_sequence_state(engine, sequence, &out[0], &out[1]) == GEMMA_CUDA_OK);
    return out;
  }
};

void the_library_says_what_it_is() {
  CHECK(gemma_cuda_abi() == GEMMA_CUDA_ABI && std::string(gemma_cuda_version()).find('.') != std::string::npos);
  if (gemma_cuda_has_cuda() == 0) {
    CHECK(gemma_cuda_gpu_count() == 0);
    refused(gemma_cuda_check_gpu(0, 1), GEMMA_CUDA_DEVICE_FAILED, nullptr, "only the reference backend");
  }
  refused(gemma_cuda_check_gpu(~0u, 0), GEMMA_CUDA_DEVICE_FAILED, nullptr, "cuda:4294967295");
}

void models_are_refused_by_name() {
  gemma_cuda_model* model = nullptr;
  refused(gemma_cuda_model_parse("{", 1, &model), nullptr, "not valid JSON");
  refused(gemma_cuda_model_parse(nullptr, 1, &model), nullptr, "json is NULL");
  refused(gemma_cuda_model_parse(kConfig, std::strlen(kConfig), nullptr), nullptr, "model is NULL");
  CHECK(model == nullptr);
  gemma_cuda_model_free(nullptr);
  const Model good;
  gemma_cuda_model_info info;
  gemma_cuda_model_info_init(&info);
  CHECK(gemma_cuda_model_get_info(good.model, &info) == GEMMA_CUDA_OK);
  CHECK(info.vocab_size == 96 && info.layers == 3 && info.tensors == 2 + 3 * 13);
  const char* name = nullptr;
  const uint64_t* shape = nullptr;
  uint32_t rank = 0;
  CHECK(gemma_cuda_model_tensor(good.model, 0, &name, &shape, &rank) == GEMMA_CUDA_OK);
  CHECK(std::string(name) == "model.embed_tokens.weight" && rank == 2 && shape[0] == 96 && shape[1] == 64);
  refused(gemma_cuda_model_tensor(good.model, info.tensors, &name, &shape, &rank), nullptr, "there is no tensor 41");

  gemma_cuda_quantization how;
  gemma_cuda_quantization_init(&how);
  how.matrices = GEMMA_CUDA_FP8_STATIC;
  how.fp8_cache = 1;
  const uint32_t kept[] = {2, 3};
  how.plain_layers = kept;
  how.plain_layer_count = 2;
  refused(gemma_cuda_model_quantize(good.model, &how), nullptr, "there is no layer 3");
  how.plain_layer_count = 1;
  CHECK(gemma_cuda_model_quantize(good.model, &how) == GEMMA_CUDA_OK);
  CHECK(gemma_cuda_model_get_info(good.model, &info) == GEMMA_CUDA_OK);
  CHECK(info.tensors == 2 + 3 * 13 + 2 * 7 * 2 + 3 * 2);  // scales of two layers' matrices, of three layers' caches
  how.matrices = 7;
  refused(gemma_cuda_model_quantize(good.model, &how), nullptr, "there is no scheme 7");
}

// Structs of an older header are shorter; of a newer one longer, and refused where that means something.
void structs_may_be_of_another_version() {
  const Model model;
  gemma_cuda_engine* engine = nullptr;
  gemma_cuda_options chosen = options();
  chosen.size = 0;
  refused(gemma_cuda_engine_create(model.model, &chosen, &engine), nullptr, "options->size is not set");
  struct Newer {
    gemma_cuda_options known;
    uint64_t unknown;
  } newer{options(), 0};
  newer.known.size = sizeof newer;
  CHECK(gemma_cuda_engine_create(model.model, &newer.known, &engine) == GEMMA_CUDA_OK);
  gemma_cuda_engine_destroy(engine);
  newer.unknown = 1;
  refused(gemma_cuda_engine_create(model.model, &newer.known, &engine), nullptr, "older than the header");
  gemma_cuda_model_info info;
  std::memset(&info, 0xEE, sizeof info);
  info.size = 12;  // vocab_size and hidden_size
  CHECK(gemma_cuda_model_get_info(model.model, &info) == GEMMA_CUDA_OK);
  CHECK(info.vocab_size == 96 && info.hidden_size == 64 && info.layers == 0xEEEEEEEE && info.size == 12);
}

void engines_are_refused_by_what_is_wrong() {
  const Model model;
  gemma_cuda_engine* engine = nullptr;
  const auto create = [&](auto change) {
    gemma_cuda_options chosen = options();
    change(chosen);
    return gemma_cuda_engine_create(model.model, &chosen, &engine);
  };
  refused(create([](auto& o) { o.device = "gpu"; }), nullptr, "'gpu' is not known");
  refused(create([](auto& o) { o.device = nullptr; }), nullptr, "options->device is NULL");
  refused(create([](auto& o) { o.compute = GEMMA_CUDA_F16; }), nullptr, "Gemma overflows");
  refused(create([](auto& o) { o.compute = 9; }), nullptr, "there is no dtype 9");
  refused(create([](auto& o) { o.pages = 0; }), nullptr, "pages is 0");
  refused(gemma_cuda_engine_create(nullptr, nullptr, &engine), nullptr, "options is NULL");
  CHECK(engine == nullptr);
  gemma_cuda_engine_destroy(nullptr);
  CHECK(std::string(gemma_cuda_engine_device(nullptr)).empty());
  gemma_cuda_memory memory;
  gemma_cuda_memory_init(&memory);
  const gemma_cuda_options chosen = options();
  CHECK(gemma_cuda_memory_budget(model.model, &chosen, &memory) == GEMMA_CUDA_OK);
  CHECK(memory.weights > 0 && memory.total >= memory.weights + memory.kv_cache);
}

void tensors_are_refused_by_name() {
  const Engine engine;
  const uint64_t shape[] = {96, 64};
  const vector<float> data(96 * 64, 0.5f);
  const auto load = [&](const char* name, uint32_t type, uint32_t rank, size_t bytes) {
    return gemma_cuda_load_tensor(engine.engine, name, type, shape, rank, data.data(), bytes);
  };
  const char* embedding = "model.embed_tokens.weight";
  refused(load("model.nothing", GEMMA_CUDA_F32, 2, data.size() * 4), engine.engine, "model.nothing");
  refused(load("vision_tower.x", GEMMA_CUDA_F32, 2, data.size() * 4), engine.engine, "vision_tower.x");
  refused(load(embedding, GEMMA_CUDA_F32, 1, 96 * 4), engine.engine, "has shape [96]");
  refused(load(embedding, GEMMA_CUDA_F32, 2, 5), engine.engine, "came with 5 bytes");
  refused(load(embedding, GEMMA_CUDA_E4M3, 2, data.size()), engine.engine, "is FP8");
  refused(load(nullptr, GEMMA_CUDA_F32, 2, 5), engine.engine, "name is NULL");
  refused(gemma_cuda_finish_loading(engine.engine), engine.engine, "is missing");
  CHECK(load("language_model.model.embed_tokens.weight", GEMMA_CUDA_F32, 2, data.size() * 4) == GEMMA_CUDA_OK);
  refused(load(embedding, GEMMA_CUDA_F32, 2, data.size() * 4), engine.engine, "was loaded before");
  gemma_cuda_item item{0, 1, 0};
  refused(gemma_cuda_step(engine.engine, &item, 1), engine.engine, "finish_loading has not been called");
}

void sequences_and_steps() {
  const Engine engine;
  engine.load();
  vector<uint32_t> tokens;
  for (uint32_t i = 0; i < 11; ++i) tokens.push_back(i * 7 % 96);
  uint32_t other = 0;
  const uint32_t too_large = 96;
  gemma_cuda_engine* const e = engine.engine;
  refused(gemma_cuda_add_sequence(e, &too_large, 1, 1, nullptr, 0, &other), e, "token id 96");
  refused(gemma_cuda_add_sequence(e, tokens.data(), 3, 4, nullptr, 0, &other), e, "4 prompt tokens of 3");
  refused(gemma_cuda_add_sequence(e, nullptr, 3, 3, nullptr, 0, &other), e, "tokens is NULL");
  gemma_cuda_sampling sampling;
  gemma_cuda_sampling_init(&sampling);
  sampling.temperature = NAN;
  refused(gemma_cuda_add_sequence(e, tokens.data(), 3, 3, &sampling, 0, &other), e, "temperature is nan");

  const uint32_t sequence = engine.add(tokens);
  gemma_cuda_output output = engine.step({sequence, 11, GEMMA_CUDA_SAMPLE | GEMMA_CUDA_SCORE | GEMMA_CUDA_LOGITS});
  CHECK(output.logit_count == 11 * 96 && output.scored_count == 10 && output.sampled != nullptr);
  CHECK(output.hidden == nullptr && output.failure == nullptr && output.scored[3].token == tokens[4]);
  const uint32_t sampled = output.sampled->token;
  CHECK((engine.state(sequence) == vector<uint32_t>{12, 11}));
  refused(gemma_cuda_get_output(e, 1, &output), e, "there is no output 1");
  gemma_cuda_item item{sequence, 2, 0};
  refused(gemma_cuda_step(e, &item, 1), e, "is to be fed 2 tokens but has 1");
  item = {sequence, 1, 64};
  refused(gemma_cuda_step(e, &item, 1), e, "flags that are not known");
  item = {7, 1, 0};
  refused(gemma_cuda_step(e, &item, 1), e, "there is no sequence 7");
  refused(gemma_cuda_step(e, nullptr, 1), e, "items is NULL");
  refused(gemma_cuda_collect(e), e, "");

  // A fork has the other's full pages (two of four tokens), and goes on as it does.
  gemma_cuda_sampling_init(&sampling);
  sampling.top_logprobs = 3;
  CHECK(gemma_cuda_fork_sequence(e, sequence, &sampling, &other) == GEMMA_CUDA_OK);
  CHECK((engine.state(other) == vector<uint32_t>{12, 8}));
  const uint32_t next = engine.step({sequence, 1, GEMMA_CUDA_SAMPLE}).sampled->token;
  output = engine.step({other, 4, GEMMA_CUDA_SAMPLE | GEMMA_CUDA_HIDDEN});
  CHECK(output.sampled->token == next && output.sampled->top_count == 3 && output.sampled->top[0].token == next);
  CHECK(output.hidden_count == 4 * 4 * 64);
  CHECK(gemma_cuda_extend_sequence(e, other, &sampled, 1) == GEMMA_CUDA_OK);
  CHECK((engine.state(other) == vector<uint32_t>{14, 12}));

  // One step is launched: a whole one is refused, a second half is not.
  item = {sequence, 1, GEMMA_CUDA_SAMPLE};
  CHECK(gemma_cuda_launch(e, &item, 1) == GEMMA_CUDA_OK);
  refused(gemma_cuda_step(e, &item, 1), e, "not collected yet");
  CHECK(gemma_cuda_collect(e) == GEMMA_CUDA_OK);

  uint32_t before = 0, after = 0, needed = 0;
  CHECK(gemma_cuda_free_pages(e, &before) == GEMMA_CUDA_OK);
  CHECK(gemma_cuda_pages_for(e, other, 2, &needed) == GEMMA_CUDA_OK && needed == 1);
  CHECK(gemma_cuda_remove_sequence(e, sequence) == GEMMA_CUDA_OK);
  CHECK(gemma_cuda_free_pages(e, &after) == GEMMA_CUDA_OK && after > before);
  refused(gemma_cuda_remove_sequence(e, sequence), e, "there is no sequence");

  vector<uint32_t> one{5};
  for (int i = 0; i < 3; ++i) engine.add(one);
  refused(gemma_cuda_add_sequence(e, one.data(), 1, 1, nullptr, 0, &other), e, "all 4 sequences are taken");
  gemma_cuda_statistics statistics;
  gemma_cuda_statistics_init(&statistics);
  CHECK(gemma_cuda_get_statistics(e, &statistics) == GEMMA_CUDA_OK);
  CHECK(statistics.steps == 4 && statistics.tokens == 11 + 1 + 4 + 1 && statistics.bytes_read > 0);
  CHECK(statistics.load_seconds > 0 && statistics.launch_seconds > 0 && statistics.memory > 0);
}

void out_of_pages_is_told_apart() {
  gemma_cuda_options few = options();
  few.pages = 2;
  const Engine engine(few);
  engine.load();
  const uint32_t sequence = engine.add(vector<uint32_t>(9, 1));
  gemma_cuda_item item{sequence, 9, 0};
  refused(gemma_cuda_step(engine.engine, &item, 1), GEMMA_CUDA_OUT_OF_PAGES, engine.engine, "needs 3 pages");
  CHECK((engine.state(sequence) == vector<uint32_t>{9, 0}));
}

void calibration_is_switched_on_and_off() {
  const Engine engine;
  engine.load();
  size_t count = 0;
  refused(gemma_cuda_read_calibration(engine.engine, &count), engine.engine, "start_calibration has not been called");
  CHECK(gemma_cuda_start_calibration(engine.engine) == GEMMA_CUDA_OK);
  const uint32_t sequence = engine.add({3, 1, 4, 1, 5});
  engine.step({sequence, 3, 0});
  CHECK(gemma_cuda_stop_calibration(engine.engine) == GEMMA_CUDA_OK);
  engine.step({sequence, 2, 0});
  CHECK(gemma_cuda_read_calibration(engine.engine, &count) == GEMMA_CUDA_OK && count == 3 * 6 + 1);
  for (size_t i = 0; i < count; ++i) {
    gemma_cuda_observation found;
    gemma_cuda_observation_init(&found);
    CHECK(gemma_cuda_get_observation(engine.engine, i, &found) == GEMMA_CUDA_OK);
    if (std::string(found.name) != "model.layers.1.mlp.down_proj.input_scale") continue;
    uint64_t counted = 0;
    for (uint32_t bin = 0; bin < GEMMA_CUDA_MAGNITUDE_BINS; ++bin) counted += found.counts[bin];
    CHECK(found.groups == 1 && counted == 3 * 128 && found.amax[0] > 0);
  }
  gemma_cuda_observation found;
  gemma_cuda_observation_init(&found);
  refused(gemma_cuda_get_observation(engine.engine, count, &found), engine.engine, "there is no observation");
}

// Errors without an engine are a thread's own, and engines' are theirs; what is logged comes to the host.
void errors_and_logs_find_their_owner() {
  refused(gemma_cuda_step(nullptr, nullptr, 0), nullptr, "engine is NULL");
  std::thread([] { CHECK(std::string(gemma_cuda_last_error(nullptr)).empty()); }).join();
  vector<std::string> lines;
  gemma_cuda_options chosen = options();
  chosen.log = [](void* user, int32_t, const char* text) { static_cast<vector<std::string>*>(user)->push_back(text); };
  chosen.log_user = &lines;
  const Engine one(chosen), two;
  one.load();
  CHECK(lines.size() == 3 && lines[0].starts_with("memory: ") && lines[1].starts_with("device: "));
  refused(gemma_cuda_remove_sequence(one.engine, 3), one.engine, "there is no sequence 3");
  CHECK(std::string(gemma_cuda_last_error(two.engine)).empty());
}

}  // namespace

int main() {
  the_library_says_what_it_is();
  models_are_refused_by_name();
  structs_may_be_of_another_version();
  engines_are_refused_by_what_is_wrong();
  tensors_are_refused_by_name();
  sequences_and_steps();
  out_of_pages_is_told_apart();
  calibration_is_switched_on_and_off();
  errors_and_logs_find_their_owner();
}
