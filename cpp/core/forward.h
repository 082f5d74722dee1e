// The forward pass: prefill, chunked prefill and decode are this one call on a ragged batch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/calibration.h"
#include "core/plan.h"
#include "core/sample_plan.h"
#include "core/spec.h"
#include "core/weights.h"
#include "ops/backend.h"

namespace gemma_cuda {

struct ForwardLimits {
  DType act;            // activations, and K/V where the layer does not keep them in FP8
  uint32_t page_size;   // tokens in a page
  uint32_t pages;       // of the KV cache
  uint32_t tokens;      // new tokens in a pass
  uint32_t sequences;   // in a pass
  uint32_t logit_rows;  // in a pass
  bool graphs;          // capture decode passes, where the backend can
};

class Forward {
 public:
  // Allocates the KV cache and all that a pass within the limits needs. The arguments outlive it.
  Forward(Backend& backend, const ModelSpec& spec, const Weights& weights, ForwardLimits limits);

  // Runs a pass of every shape that is captured once, on rows that see and write nothing, and captures it, and the
  // largest pass of all: what is slow the first time is over before the first step. Nothing where the backend does not
  // capture.
  void warm_up(uint32_t* last_tokens);

  // Leaves the logits of plan.logit_rows on the device, float32 [r, vocab]; valid until the next pass. `samples`, at
  // most one task for each of those rows, are done with them, and their results are the backend's to be waited for.
  // Where `hidden` is given it becomes [layers + 1][t, hidden_size]: the scaled embeddings, each layer's output, the
  // last one after the final norm. `last_tokens`, on the device, is where pending tokens are; always the same.
  const float* run(const BatchPlan& plan, const SamplePlan& samples, uint32_t* last_tokens,
                   std::vector<std::vector<float>>* hidden);

  // Whether a pass of this plan, with no hidden states asked for, replays a captured one.
  bool is_captured(const BatchPlan& plan) const { return observer_ == nullptr && captured(plan) != nullptr; }

  // From now on every pass adds its activations to what was gathered; it is not a captured one then. Null: no more.
  void observe(const Calibration* calibration) { observer_ = calibration; }

  static uint64_t kv_cache_bytes(const ModelSpec& spec, const ForwardLimits& limits);
  static uint64_t activation_bytes(const ModelSpec& spec, const ForwardLimits& limits);
  static uint64_t logit_bytes(const ModelSpec& spec, const ForwardLimits& limits);

 private:
  // The plan on the device: parts of one buffer, so that it goes there in one piece.
  struct Tables {
    const uint32_t *ids, *positions, *slots, *cu_seqlens, *kv_len, *block_table, *logit_rows;
    const QueryTile* query_tiles;
    const SampleTask* tasks;        // one for each of logit_rows; those that are nobody's do nothing
    const Adjustment* adjustments;  // last: how many there are differs where all else has the same shape
  };
  struct Activations {
    Buffer residual;                    // [t, hidden] float32
    Buffer x;                           // [t, hidden] a block's normed input, then its output
    Buffer x8;                          // [t or r, the wider of hidden and q_width] inputs of products in FP8, and
    Buffer x_scales, activated_scales;  // their scales where they are dynamic: [t or r] and [a slice of t]
    Buffer cast, cast_scales;           // a matrix of fp8_cast as it was quantized last
    Buffer within;                      // what a block has only within it, one after the other in the same memory
    char* qkv;                          // [t, qkv_width]
    char* q;                            // [t, q_width] rotated queries
    char* attended;                     // [t, q_width]
    char* gate_up;                      // [a slice of t, 2 ffn]
    char* activated;                    // [a slice of t, ffn]
    Buffer residual_last;               // [r, hidden] float32, of the rows that the last layer goes on with
    Buffer last;                        // [r, hidden] normed rows for the logits
    Buffer logits;                      // [r, vocab] float32
  };
  struct KvBuffers {
    Buffer keys, values;
  };

  struct CapturedPass {
    PassShape shape;
    std::unique_ptr<Graph> graph;
  };

  PassShape largest() const;
  void upload(const BatchPlan& plan, const SamplePlan& samples);
  const CapturedPass* captured(const BatchPlan& plan) const;
  void pass(const BatchPlan& plan, std::vector<std::vector<float>>* hidden);
  // The rows of the residual stream that are still computed with. Behind the attention of the last layer these are, of
  // passes with prompts, only those whose logits are wanted.
  struct Stream {
    float* residual;  // [tokens, hidden]
    uint32_t tokens;
    const uint32_t* logit_rows;  // of these; null: all in order
  };
  Stream narrowed(const BatchPlan& plan);
  // A block of a layer, and what adds its output to the residual stream: the attention of the rows in `stream`, whose
  // keys and values are computed for all.
  void attention_block(uint32_t layer, const BatchPlan& plan, const Stream& stream, const NormArgs& add);
  void mlp_block(uint32_t layer, uint32_t tokens, const NormArgs& add);
  // residual += delta (normed by `post` where the model does), then the input of `reader` = norm(residual, next) where
  // there is a next.
  NormArgs add_and_norm(const Stream& stream, const Buffer* post, const Buffer* next, const Linear* reader);
  // How the inputs of a matrix are quantized, if they are, and where the normed ones lie.
  Quantize quantize(const Linear& reader, const Buffer& row_scales) const;
  char* input_of(const Linear& reader) const;
  void observe(const void* x, uint32_t rows, uint32_t width, Magnitudes Calibration::Layer::*what, uint32_t layer);
  Matrix matrix_of(const Linear& w);
  // What a matrix is multiplied with, which may be quantized for it.
  GemmArgs product(const void* x, Quantize x_scale, const Linear& w, void* out, uint32_t tokens, uint32_t capacity);
  void keep_hidden(std::vector<std::vector<float>>* hidden, uint32_t tokens);
  void observe_last(uint32_t tokens);
  void norm_last(uint32_t tokens);
  void replace_last_hidden(std::vector<std::vector<float>>& hidden, uint32_t tokens);
  void sample_last(const BatchPlan& plan, const Stream& stream);
  SampleArgs sampling(const SampleTask* tasks, const Adjustment* adjustments, uint32_t first, uint32_t count,
                      uint32_t max_top) const;
  bool holds(const SamplePlan& samples) const;
  void sample_behind(const SamplePlan& samples, uint32_t rows);

  Backend& backend_;
  const ModelSpec& spec_;
  const Weights& weights_;
  ForwardLimits limits_;
  float embedding_scale_;
  Buffer table_memory_;
  Tables tables_{};
  uint32_t* last_tokens_ = nullptr;
  uint64_t passes_ = 0;  // run or recorded
  const Calibration* observer_ = nullptr;
  Activations act_;
  std::vector<KvBuffers> kv_;
  std::vector<CapturedPass> captured_;  // the smallest first; destroyed before what they point to
};

}  // namespace gemma_cuda
