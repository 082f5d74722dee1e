// Sequences of calls of the C API, right ones and wrong ones, made of bytes: of a fuzzer (LLVMFuzzerTestOneInput), or
// of a random generator where this file's main() runs it for some seconds. Built with sanitizers it shows what a call
// reads, writes or leaks that it must not; by itself it holds every answer against what the header promises.
//
//     fuzz_c_api [SECONDS [SEED]]
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gemma_cuda.h"

namespace {

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

// Bytes as choices; zeros when they have run out.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool done() const { return at_ >= size_; }
  uint32_t below(uint32_t n) { return next() % n; }
  // Mostly below n, sometimes anything.
  uint32_t near(uint32_t n) {
    const uint32_t kind = next();
    return kind < 230 ? below(n) : kind < 240 ? n : kind < 250 ? ~0u : next() << 24 | next() << 8;
  }
  float number() {
    constexpr float kOdd[] = {0,
                              1,
                              -1,
                              0.5f,
                              1e30f,
                              -1e30f,
                              std::numeric_limits<float>::infinity(),
                              0.9f,
                              1e-8f,
                              2.0f,
                              std::numeric_limits<float>::quiet_NaN()};
    return kOdd[below(sizeof kOdd / sizeof *kOdd)];
  }

 private:
  uint32_t next() { return at_ < size_ ? data_[at_++] : (++at_, 0u); }
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

constexpr uint32_t kVocab = 40, kPages = 12;

std::string config(Choices& choose) {
  constexpr const char* kTypes[] = {"gemma", "gemma2", "gemma3_text", "gemma3", "llama"};
  std::string out = "{\"model_type\": \"" + std::string(kTypes[choose.near(4) % 5]) +
                    "\", \"vocab_size\": 40, \"hidden_size\": 16, \"intermediate_size\": 32, \"head_dim\": 8, "
                    "\"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"max_position_embeddings\": 64, "
                    "\"sliding_window\": 5, \"num_hidden_layers\": " +
                    std::to_string(1 + choose.below(3)) + "}";
  if (choose.below(16) == 0) out[choose.near(static_cast<uint32_t>(out.size())) % out.size()] = '\"';
  return out;
}

class Session {
 public:
  explicit Session(Choices& choose) : choose_(choose) {}
  ~Session() {
    gemma_cuda_engine_destroy(engine_);
    gemma_cuda_model_free(model_);
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void run() {
    const std::string json = config(choose_);
    if (gemma_cuda_model_parse(json.data(), json.size(), &model_) != GEMMA_CUDA_OK) return;
    if (choose_.below(2) == 1) quantize();
    if (!create()) return;
    if (choose_.below(8) != 0) check(gemma_cuda_load_random(engine_, choose_.below(3)));
    if (choose_.below(8) != 0) ready_ = check(gemma_cuda_finish_loading(engine_)) == GEMMA_CUDA_OK;
    for (int calls = 0; calls < 200 && !choose_.done(); ++calls) call();
  }

 private:
  gemma_cuda_status check(gemma_cuda_status status) const {
    require(status >= GEMMA_CUDA_OK && status <= GEMMA_CUDA_OUT_OF_MEMORY, "a status that the header names");
    if (status != GEMMA_CUDA_OK && engine_ != nullptr)
      require(gemma_cuda_last_error(engine_)[0] != '\0', "a sentence for what failed");
    return status;
  }

  void quantize() {
    gemma_cuda_quantization how;
    gemma_cuda_quantization_init(&how);
    how.matrices = choose_.near(3);
    how.lm_head = choose_.near(3);
    how.fp8_cache = choose_.below(2);
    const uint32_t layer = choose_.near(3);
    how.plain_layers = &layer;
    how.plain_layer_count = choose_.below(2);
    check(gemma_cuda_model_quantize(model_, &how));
  }

  bool create() {
    gemma_cuda_options options;
    gemma_cuda_options_init(&options);
    options.device = choose_.below(16) == 0 ? "cuda:77" : "reference";
    options.threads = 1;
    options.page_size = 1 + choose_.below(6);
    options.pages = kPages;
    options.max_batch_tokens = 16;
    options.max_sequences = 3;
    options.max_logit_rows = 8;
    options.prefix_cache = choose_.below(2);
    if (choose_.below(32) == 0) options.compute = choose_.near(4);
    const gemma_cuda_status status = gemma_cuda_engine_create(model_, &options, &engine_);
    require((status == GEMMA_CUDA_OK) == (engine_ != nullptr), "an engine if and only if it was made");
    return engine_ != nullptr;
  }

  void call() {
    switch (choose_.below(12)) {
      case 0: return add();
      case 1: return extend();
      case 2: return fork();
      case 3: check(gemma_cuda_remove_sequence(engine_, choose_.near(3))); return;
      case 4: return look();
      case 5:
        check(choose_.below(2) == 0 ? gemma_cuda_start_calibration(engine_) : gemma_cuda_stop_calibration(engine_));
        return;
      case 6: return observe();
      case 7: return load();
      case 8: step(gemma_cuda_launch); return;
      case 9: check(gemma_cuda_collect(engine_)); return outputs();
      default: step(gemma_cuda_step); return outputs();
    }
  }

  std::vector<uint32_t> tokens() {
    std::vector<uint32_t> out(choose_.below(20));
    for (uint32_t& token : out) token = choose_.near(kVocab);
    return out;
  }

  gemma_cuda_sampling sampling() {
    gemma_cuda_sampling out;
    gemma_cuda_sampling_init(&out);
    bias_ = {choose_.near(kVocab), choose_.number()};
    stop_ = choose_.near(kVocab);
    if (choose_.below(2) == 0) return out;
    out.temperature = choose_.number();
    out.top_k = choose_.near(5);
    out.top_p = choose_.number();
    out.min_p = choose_.number();
    out.repetition_penalty = choose_.number();
    out.presence_penalty = choose_.number();
    out.top_logprobs = choose_.near(5);
    out.logit_bias = &bias_;
    out.logit_bias_count = choose_.below(2);
    out.stop_tokens = &stop_;
    out.stop_token_count = choose_.below(2);
    out.min_new_tokens = choose_.near(4);
    return out;
  }

  void add() {
    const std::vector<uint32_t> known = tokens();
    const gemma_cuda_sampling how = sampling();
    uint32_t sequence = 0;
    check(gemma_cuda_add_sequence(engine_, known.data(), known.size(),
                                  choose_.near(static_cast<uint32_t>(known.size()) + 1), &how, choose_.below(2),
                                  &sequence));
  }

  void extend() {
    const std::vector<uint32_t> known = tokens();
    check(gemma_cuda_extend_sequence(engine_, choose_.near(3), known.data(), known.size()));
  }

  void fork() {
    const gemma_cuda_sampling how = sampling();
    uint32_t sequence = 0;
    check(gemma_cuda_fork_sequence(engine_, choose_.near(3), &how, &sequence));
  }

  void look() {
    uint32_t known = 0, cached = 0, pages = 0;
    const uint32_t sequence = choose_.near(3);
    if (check(gemma_cuda_sequence_state(engine_, sequence, &known, &cached)) == GEMMA_CUDA_OK)
      require(cached <= known, "no more tokens are cached than known");
    require(check(gemma_cuda_free_pages(engine_, &pages)) == GEMMA_CUDA_OK && pages <= kPages,
            "no more pages than there are");
    check(gemma_cuda_pages_for(engine_, sequence, choose_.near(20), &pages));
    gemma_cuda_statistics statistics;
    gemma_cuda_statistics_init(&statistics);
    require(check(gemma_cuda_get_statistics(engine_, &statistics)) == GEMMA_CUDA_OK, "statistics are always there");
    require(statistics.memory <= statistics.peak_memory, "the most is the most");
  }

  void observe() {
    size_t count = 0;
    if (check(gemma_cuda_read_calibration(engine_, &count)) != GEMMA_CUDA_OK) return;
    gemma_cuda_observation found;
    gemma_cuda_observation_init(&found);
    const uint32_t index = choose_.near(static_cast<uint32_t>(count));
    const gemma_cuda_status status = check(gemma_cuda_get_observation(engine_, index, &found));
    require((status == GEMMA_CUDA_OK) == (index < count), "as many observations as were read");
    if (status == GEMMA_CUDA_OK)
      require(std::strlen(found.name) > 0 && found.amax[found.groups - 1] >= 0, "an observation");
  }

  void load() {
    const std::vector<float> data(choose_.below(64), choose_.number());
    const uint64_t shape[] = {choose_.near(41), choose_.near(17)};
    constexpr const char* kNames[] = {
        "model.embed_tokens.weight",        "model.norm.weight", "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.k_scale", "nothing",           ""};
    check(gemma_cuda_load_tensor(engine_, kNames[choose_.below(6)], choose_.near(4), shape, choose_.below(3),
                                 data.data(), data.size() * sizeof(float)));
  }

  template <class F>
  void step(F call) {
    std::vector<gemma_cuda_item> items(choose_.below(4));
    std::vector<uint32_t> before;
    for (gemma_cuda_item& item : items) {
      uint32_t known = 0, cached = 0;
      item = {choose_.near(3), 1, choose_.near(16)};
      if (gemma_cuda_sequence_state(engine_, item.sequence, &known, &cached) == GEMMA_CUDA_OK && known > cached)
        item.tokens = choose_.below(4) == 0 ? choose_.near(20) : known - cached;
      before.push_back(cached);
    }
    const gemma_cuda_status status = check(call(engine_, items.data(), items.size()));
    require(ready_ || status != GEMMA_CUDA_OK, "no step before loading is finished");
    if (status == GEMMA_CUDA_OK) return;
    for (size_t i = 0; i < items.size(); ++i) {
      uint32_t known = 0, cached = 0;
      if (gemma_cuda_sequence_state(engine_, items[i].sequence, &known, &cached) == GEMMA_CUDA_OK)
        require(cached == before[i], "a step that failed has changed nothing");
    }
  }

  void outputs() {
    gemma_cuda_output output;
    gemma_cuda_output_init(&output);
    for (size_t i = 0; gemma_cuda_get_output(engine_, i, &output) == GEMMA_CUDA_OK; ++i) {
      float sum = 0;  // everything that is handed out can be read
      for (size_t j = 0; j < output.logit_count; ++j) sum += output.logits[j];
      for (size_t j = 0; j < output.hidden_count; ++j) sum += output.hidden[j];
      for (size_t j = 0; j < output.scored_count; ++j) sum += output.scored[j].logprob;
      if (output.sampled != nullptr) {
        require(output.sampled->token < kVocab, "a token of the vocabulary");
        for (size_t j = 0; j < output.sampled->top_count; ++j) sum += output.sampled->top[j].logprob;
      }
      sum_ = sum;
    }
  }

  Choices& choose_;
  gemma_cuda_model* model_ = nullptr;
  gemma_cuda_engine* engine_ = nullptr;
  gemma_cuda_bias bias_{};
  uint32_t stop_ = 0;
  bool ready_ = false;
  volatile float sum_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Choices choose(data, size);
  Session(choose).run();
  return 0;
}

#ifndef GEMMA_CUDA_LIBFUZZER
int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 2;
  const uint32_t seed = argc > 2 ? static_cast<uint32_t>(std::strtoul(argv[2], nullptr, 10)) : std::random_device{}();
  std::printf("seed %u\n", seed);
  std::fflush(stdout);
  std::mt19937 random(seed);
  const auto start = std::chrono::steady_clock::now();
  uint64_t runs = 0;
  for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++runs) {
    std::vector<uint8_t> bytes(200 + random() % 3000);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%llu sessions\n", static_cast<unsigned long long>(runs));
}
#endif
