// Streams the tokens that follow a prompt, one line each as it comes, with the model's log-probability. Shows the C API
// behind C++ objects, and steps that are launched ahead: while the host writes a token, the device computes the next
// one.
//
//     stream MODEL_FOLDER TOKEN...          token ids of the prompt; the environment's DEVICE says where, NEW how many
#include <gemma_cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(gemma_cuda_status status, const gemma_cuda_engine* engine = nullptr) {
  if (status != GEMMA_CUDA_OK) throw std::runtime_error(gemma_cuda_last_error(engine));
}

struct Free {
  void operator()(gemma_cuda_model* model) const { gemma_cuda_model_free(model); }
  void operator()(gemma_cuda_engine* engine) const { gemma_cuda_engine_destroy(engine); }
};
using Model = std::unique_ptr<gemma_cuda_model, Free>;
using Engine = std::unique_ptr<gemma_cuda_engine, Free>;

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error(path + " cannot be read");
  return {std::istreambuf_iterator<char>(in), {}};
}

Model read_model(const std::string& folder) {
  const std::string json = read_file(folder + "/config.json");
  gemma_cuda_model* model = nullptr;
  check(gemma_cuda_model_parse(json.data(), json.size(), &model));
  return Model(model);
}

Engine make_engine(const gemma_cuda_model* model, const char* device) {
  gemma_cuda_options options;
  gemma_cuda_options_init(&options);
  options.device = device;
  gemma_cuda_engine* engine = nullptr;
  check(gemma_cuda_engine_create(model, &options, &engine));
  return Engine(engine);
}

// The header of a safetensors file is JSON; this finds one tensor's entry in it.
class TensorFile {
 public:
  explicit TensorFile(const std::string& path) : bytes_(read_file(path)) {
    unsigned long long length = 0;
    if (bytes_.size() >= 8) std::memcpy(&length, bytes_.data(), 8);
    if (length == 0 || length > bytes_.size() - 8) throw std::runtime_error(path + " is no safetensors file");
    header_ = bytes_.substr(8, length);
    data_ = bytes_.data() + 8 + length;
  }

  void load(gemma_cuda_engine* engine, const char* name, const uint64_t* shape, uint32_t rank) const {
    const size_t at = header_.find('"' + std::string(name) + "\":{");
    if (at == std::string::npos) throw std::runtime_error(std::string(name) + " is not in the file");
    const std::string entry = header_.substr(at, header_.find('}', at) - at);
    const size_t offsets = entry.find("\"data_offsets\":[") + std::strlen("\"data_offsets\":[");
    char* comma = nullptr;
    const unsigned long long begin = std::strtoull(entry.c_str() + offsets, &comma, 10),
                             end = std::strtoull(comma + 1, nullptr, 10);
    if (begin > end || end > static_cast<size_t>(bytes_.data() + bytes_.size() - data_))
      throw std::runtime_error(std::string(name) + " is outside the file");
    const bool wide = entry.find("\"F32\"") != std::string::npos, narrow = entry.find("\"BF16\"") != std::string::npos;
    if (!wide && !narrow) throw std::runtime_error(std::string(name) + " is neither F32 nor BF16");
    check(gemma_cuda_load_tensor(engine, name, wide ? GEMMA_CUDA_F32 : GEMMA_CUDA_BF16, shape, rank, data_ + begin,
                                 end - begin),
          engine);
  }

 private:
  std::string bytes_, header_;
  const char* data_ = nullptr;
};

void load(gemma_cuda_engine* engine, const gemma_cuda_model* model, const std::string& folder) {
  const TensorFile file(folder + "/model.safetensors");
  gemma_cuda_model_info info;
  gemma_cuda_model_info_init(&info);
  check(gemma_cuda_model_get_info(model, &info));
  for (uint32_t i = 0; i < info.tensors; ++i) {
    const char* name = nullptr;
    const uint64_t* shape = nullptr;
    uint32_t rank = 0;
    check(gemma_cuda_model_tensor(model, i, &name, &shape, &rank));
    file.load(engine, name, shape, rank);
  }
  check(gemma_cuda_finish_loading(engine), engine);
}

template <class Report>
void stream(gemma_cuda_engine* engine, const std::vector<uint32_t>& prompt, int count, Report report) {
  gemma_cuda_sampling sampling;
  gemma_cuda_sampling_init(&sampling);
  uint32_t sequence = 0;
  check(gemma_cuda_add_sequence(engine, prompt.data(), prompt.size(), prompt.size(), &sampling, 1, &sequence), engine);
  uint32_t cached = 0, known = 0;
  check(gemma_cuda_sequence_state(engine, sequence, &known, &cached), engine);
  const auto launch = [&](uint32_t tokens) {
    const gemma_cuda_item item{sequence, tokens, GEMMA_CUDA_SAMPLE};
    check(gemma_cuda_launch(engine, &item, 1), engine);
  };
  launch(known - cached);
  for (int i = 0; i < count; ++i) {
    if (i + 1 < count) launch(1);  // feeds the token that the step before is still computing
    check(gemma_cuda_collect(engine), engine);
    gemma_cuda_output output;
    gemma_cuda_output_init(&output);
    check(gemma_cuda_get_output(engine, 0, &output), engine);
    if (output.sampled == nullptr) throw std::runtime_error(output.failure != nullptr ? output.failure : "no token");
    report(*output.sampled);
  }
  check(gemma_cuda_remove_sequence(engine, sequence), engine);
}

const char* setting(const char* name, const char* otherwise) {
  const char* found = std::getenv(name);
  return found != nullptr ? found : otherwise;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("usage: stream MODEL_FOLDER TOKEN...");
  std::vector<uint32_t> prompt;
  for (int i = 2; i < argc; ++i) prompt.push_back(static_cast<uint32_t>(std::strtoul(argv[i], nullptr, 10)));
  const Model model = read_model(argv[1]);
  const Engine engine = make_engine(model.get(), setting("DEVICE", "auto"));
  std::fprintf(stderr, "%s\n", gemma_cuda_engine_device(engine.get()));
  load(engine.get(), model.get(), argv[1]);
  stream(engine.get(), prompt, std::atoi(setting("NEW", "16")), [](const gemma_cuda_token& token) {
    std::printf("%u %.4f\n", token.token, static_cast<double>(token.logprob));
    std::fflush(stdout);
  });
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
