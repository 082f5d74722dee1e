// The model's parameters on the device, and what of them is still to come.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/spec.h"
#include "core/tensor_table.h"
#include "ops/backend.h"

namespace gemma_cuda {

// Norm weights are kept in float32, as the checkpoint has them (used as 1 + w).
struct LayerWeights {
  Buffer qkv, attention_out, gate_up, down;
  Buffer q_norm, k_norm;
  Buffer pre_attention_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm;
  Buffer inverse_frequency;  // [head_dim / 2]
};

class Weights {
 public:
  // Allocates everything; matrices are kept as `dtype`.
  Weights(Backend& backend, const ModelSpec& spec, DType dtype);

  void load(std::string_view name, DType dtype, std::span<const uint64_t> shape, std::span<const uint8_t> bytes);
  // Random matrices and zero norm weights (which scale by 1), for measuring a shape without its weights.
  void load_random(uint64_t seed);
  // Throws naming the first tensor that has not come.
  void require_all() const;

  const LayerWeights& layer(uint32_t index) const { return layers_[index]; }
  const Buffer& final_norm() const { return final_norm_; }
  Matrix embedding() const { return matrix(embedding_, spec_.vocab_size, spec_.hidden_size); }
  Matrix lm_head() const {
    return matrix(spec_.tied_embeddings ? embedding_ : lm_head_, spec_.vocab_size, spec_.hidden_size);
  }
  Matrix matrix(const Buffer& buffer, uint32_t rows, uint32_t cols) const {
    return {buffer.data(), dtype_, rows, cols};
  }

  static uint64_t bytes(const ModelSpec& spec, DType dtype);

 private:
  Buffer& slot(const TensorSlot& tensor);

  Backend& backend_;
  const ModelSpec& spec_;
  DType dtype_;
  Buffer embedding_, lm_head_, final_norm_;
  std::vector<LayerWeights> layers_;
  std::map<std::string, TensorSlot, std::less<>> waiting_;
  std::map<std::string, TensorSlot, std::less<>> loaded_;
};

}  // namespace gemma_cuda
