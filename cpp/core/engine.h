// The engine: a model on a device, its paged KV cache, the sequences in it, and the step that moves them on.
//
// One engine is used by one thread at a time. Every call either does what it says or throws gemma_cuda::Error and
// changes nothing.
//
// A device that fails in a step ends the engine: the error names the step, and from then on every step is refused with
// that error. CUDA gives a process one context a GPU, so a kernel's fault (an illegal address, say) ends all engines of
// the process on that GPU, each with its own error at its next call; those on other devices live on, and a new process
// can use the GPU again.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/observation.h"
#include "core/spec.h"
#include "core/tensor_table.h"
#include "ops/dtype.h"
#include "ops/sampling.h"

namespace gemma_cuda {

struct EngineOptions {
  std::string device = "auto";      // "auto", "reference", "cuda:N"
  DType compute = DType::bf16;      // activations and K/V; accumulation is always float32
  DType weights = DType::bf16;      // matrices in memory
  uint32_t page_size = 32;          // tokens in one page of the KV cache
  uint32_t pages = 256;             // of the KV cache
  uint32_t max_batch_tokens = 256;  // new tokens in one step, over all sequences
  uint32_t max_sequences = 64;      // alive at once
  uint32_t max_logit_rows = 64;     // rows of logits in one step
  uint32_t threads = 0;             // of the reference backend; 0: all cores
  bool graphs = true;               // capture decode steps, where the device can
  bool prefix_cache = true;         // keep pages of finished sequences for prompts that start alike
  // For comparison only: steps are computed as without a ragged layout. Every sequence is filled up to the one with the
  // most new tokens, and one that was removed keeps its rows until all are. The filling counts in max_batch_tokens.
  bool padded = false;
};

struct BatchPlan;
struct SamplePlan;
class Backend;

// Bytes of the device's memory an engine takes: all of it before its first step, but for the kernels and recorded
// graphs that the driver keeps. `workspace` is what the operations need for themselves. Where more is left, a packed
// output embedding comes on top (Weights::finish).
struct MemoryBudget {
  uint64_t weights = 0, kv_cache = 0, activations = 0, logits = 0, workspace = 0;
  uint64_t total() const;  // at most 2^64 - 1
};
MemoryBudget memory_budget(const ModelSpec& spec, const EngineOptions& options);

// One sequence's part in a step: feed its next `tokens` known tokens.
struct StepItem {
  uint32_t sequence = 0;
  uint32_t tokens = 0;
  bool sample = false;  // the next token after the last fed one, which must be the last known one; append it
  bool score = false;   // log-probability of every known token that follows a fed one
  bool logits = false;  // [tokens, vocab_size]
  bool hidden = false;  // [layers + 1, tokens, hidden_size]: scaled embeddings, each layer's output, the last one
                        // after the final norm
};

struct ItemOutput {
  uint32_t sequence = 0;
  std::vector<ScoredToken> sampled;  // none or one
  std::vector<ScoredToken> scored;
  std::vector<float> logits;
  std::vector<float> hidden;
  // Why the sequence can only be removed: it has logits that are not finite. Empty where all is well; else nothing is
  // sampled or scored.
  std::string failure;
};

// What an engine has done since it was made. The numbers of a stretch are the difference of two of these.
struct EngineStatistics {
  uint64_t steps = 0;
  uint64_t captured_steps = 0;  // that were a captured graph
  uint64_t tokens = 0;          // fed
  uint64_t bytes_read = 0;      // that the steps had to read at least, and what they had to compute (core/cost.h)
  uint64_t flops = 0;
  uint64_t memory = 0, peak_memory = 0;  // bytes allocated on the device, and the most that were
};

struct SequenceState {
  uint32_t tokens = 0;  // known: prompt and generated
  uint32_t cached = 0;  // those whose keys and values are in the cache
};

class Engine {
 public:
  Engine(ModelSpec spec, EngineOptions options);
  // On this backend, whatever options.device says.
  Engine(ModelSpec spec, EngineOptions options, std::unique_ptr<Backend> backend);
  ~Engine();

  std::string device_name() const;

  // `bytes` holds the row-major tensor `name` (a canonical name of tensor_table). Converted to what the engine keeps.
  void load_tensor(std::string_view name, DType dtype, std::span<const uint64_t> shape, std::span<const uint8_t> bytes);
  // Random weights instead, for measuring a shape without its weights.
  void load_random(uint64_t seed);
  // After the last tensor. Throws naming the first that is missing.
  void finish_loading();

  // Starts a sequence of known tokens: the first `prompt_tokens` are the prompt, the rest count as generated. With
  // `reuse_prefix`, whole pages that another sequence left behind are taken over. Returns the sequence's number.
  uint32_t add_sequence(std::span<const uint32_t> tokens, uint32_t prompt_tokens, const SamplingConfig& sampling,
                        bool reuse_prefix);
  // The same tokens once more, of which none may be pending, with another sampling; full pages are shared.
  uint32_t fork_sequence(uint32_t sequence, const SamplingConfig& sampling);
  void append_tokens(uint32_t sequence, std::span<const uint32_t> tokens);
  void remove_sequence(uint32_t sequence);
  SequenceState sequence_state(uint32_t sequence) const;

  uint32_t free_pages() const;  // those kept only for reuse included
  uint32_t pages_for(uint32_t sequence, uint32_t tokens) const;

  // One forward pass over any mix of prefill chunks and decode rows.
  std::vector<ItemOutput> step(std::span<const StepItem> items);

  // The halves of a step. After launch() a sequence's sampled token is known as a token, though not yet which: the next
  // step that feeds it can be launched before collect() waits for it, so that the device never waits for the host. Up
  // to kMaxAhead steps may be launched and not collected; a sequence may be removed in between, and then its outputs
  // are empty. Penalties look at all tokens, so a sequence with them can be sampled only when none is pending.
  void launch(std::span<const StepItem> items);
  std::vector<ItemOutput> collect();
  // Steps that are launched and not collected.
  uint32_t launched() const;
  // Whether launching ahead gains anything: a device that is not asynchronous has computed when launch() returns.
  bool runs_ahead() const;
  static constexpr uint32_t kMaxAhead = 2;

  EngineStatistics statistics() const;
  // Bytes read and written in a second by a copy within the device's memory, measured now, beside what is allocated.
  double copy_bandwidth();

  // From now on every step gathers the magnitudes of all activations, until it is stopped; a model with FP8 is refused.
  void start_calibration();
  void stop_calibration();
  // What was gathered since it was started.
  std::vector<Observation> calibration() const;

 private:
  struct Launched;
  SamplePlan plan_samples(Launched& step);
  void copy_out(Launched& step, const BatchPlan& plan, const float* logits,
                const std::vector<std::vector<float>>& hidden);
  void advance(const Launched& step);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace gemma_cuda
