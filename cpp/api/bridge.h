// The cxx bridge's C++ side: the core's types turned into Rust's and back. Nothing is decided here.
#pragma once

#include <cstdint>
#include <memory>

#include "core/engine.h"
#include "rust/cxx.h"

namespace gemma_cuda::bridge {

struct EngineOptions;
struct EngineStatistics;
struct ItemOutput;
struct MemoryBudget;
struct ModelConfig;
struct ModelSpec;
struct Observation;
struct SamplingConfig;
struct SequenceState;
struct StepItem;
struct TensorSlot;
enum class DType : uint8_t;
enum class Scheme : uint8_t;

ModelConfig parse_config(rust::Str json);
rust::String canonical_tensor_name(rust::Str name);
rust::Vec<uint8_t> quantize_e4m3(DType dtype, rust::Slice<const uint8_t> bytes, rust::Slice<const float> scales);
rust::Vec<TensorSlot> tensor_table(const ModelSpec& spec);
MemoryBudget memory_budget(const ModelSpec& spec, const EngineOptions& options);

class Engine {
 public:
  Engine(gemma_cuda::ModelSpec spec, gemma_cuda::EngineOptions options);

  rust::String device_name() const;
  void load_tensor(rust::Str name, DType dtype, rust::Slice<const uint64_t> shape, rust::Slice<const uint8_t> bytes);
  void load_random(uint64_t seed);
  void finish_loading();
  uint32_t add_sequence(rust::Slice<const uint32_t> tokens, uint32_t prompt_tokens, const SamplingConfig& sampling,
                        bool reuse_prefix);
  void append_tokens(uint32_t sequence, rust::Slice<const uint32_t> tokens);
  void remove_sequence(uint32_t sequence);
  SequenceState sequence_state(uint32_t sequence) const;
  uint32_t free_pages() const;
  uint32_t pages_for(uint32_t sequence, uint32_t tokens) const;
  rust::Vec<ItemOutput> step(rust::Slice<const StepItem> items);
  void launch(rust::Slice<const StepItem> items);
  rust::Vec<ItemOutput> collect();
  bool runs_ahead() const;
  void start_calibration();
  rust::Vec<Observation> calibration() const;
  EngineStatistics statistics() const;
  double copy_bandwidth();

 private:
  gemma_cuda::Engine engine_;
};

std::unique_ptr<Engine> new_engine(const ModelSpec& spec, const EngineOptions& options);

}  // namespace gemma_cuda::bridge
