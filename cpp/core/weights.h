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

// A matrix [rows, cols] that activations are multiplied with.
struct Linear {
  Scheme scheme = Scheme::plain;
  uint32_t rows = 0, cols = 0;
  Buffer values;
  Buffer scales;          // FP8: [rows]
  Buffer input_scale;     // fp8_static, fp8_cast: one
  bool one_scale = true;  // whether all of `scales` are the same
  float first_scale = 0;  // of those seen so far; 0: none

  void note_scales(std::span<const float> scales_of_rows);
};

// Norm weights are kept in float32, as the checkpoint has them (used as 1 + w).
struct LayerWeights {
  Linear qkv, attention_out, gate_up, down;
  Buffer q_norm, k_norm;
  Buffer pre_attention_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm;
  Buffer inverse_frequency;         // [head_dim / 2]
  Buffer key_scales, value_scales;  // of an FP8 cache: [kv_heads]
};

class Weights {
 public:
  // Allocates everything; plain matrices are kept as `dtype`.
  Weights(Backend& backend, const ModelSpec& spec, DType dtype);

  void load(std::string_view name, DType dtype, std::span<const uint64_t> shape, std::span<const uint8_t> bytes);
  // Random matrices, zero norm weights (which scale by 1) and scales that are near what fits, for measuring a shape
  // without its weights.
  void load_random(uint64_t seed);
  // Throws naming the first tensor that has not come; else loading is over. Where the backend can make use of it, and
  // memory is left when all the engine needs is taken, a plain output embedding in bf16 is packed beside its own bytes,
  // of which decode then reads three quarters (Backend::pack).
  void finish();

  const LayerWeights& layer(uint32_t index) const { return layers_[index]; }
  const Buffer& final_norm() const { return final_norm_; }
  Matrix embedding() const { return {embedding_.data(), dtype_, spec_.vocab_size, spec_.hidden_size}; }
  Matrix lm_head() const {
    Matrix head = lm_head_.values.data() ? matrix(lm_head_) : embedding();
    head.packed = packed_lm_head_.data();
    return head;
  }
  uint64_t packed_lm_head_bytes() const { return packed_lm_head_.bytes(); }  // 0: it is not
  const Linear& lm_head_linear() const { return lm_head_; }
  Matrix matrix(const Linear& linear) const {
    return {linear.values.data(),
            kept_in_fp8(linear.scheme) ? DType::e4m3 : dtype_,
            linear.rows,
            linear.cols,
            linear.scales.as<float>(),
            linear.one_scale};
  }

  static uint64_t bytes(const ModelSpec& spec, DType dtype);

 private:
  Linear* linear(const TensorSlot& tensor);  // null: a vector, or the embedding
  Buffer& buffer(const TensorSlot& tensor);
  DType kept(const TensorSlot& tensor);
  void load_values(const TensorSlot& tensor, DType dtype, std::span<const uint8_t> bytes);
  void load_scales(const TensorSlot& tensor, DType dtype, std::span<const uint8_t> bytes);
  void quantize(const TensorSlot& tensor, DType dtype, std::span<const uint8_t> bytes);
  template <class F>
  void quantize_rows(const TensorSlot& tensor, DType staged, bool scaled, F bring);
  void fill_scales(Linear& matrix, const TensorSlot& tensor, float scale);
  void pack_lm_head();

  Backend& backend_;
  const ModelSpec& spec_;
  DType dtype_;
  Buffer embedding_, final_norm_;
  Linear lm_head_;
  Buffer packed_lm_head_;
  std::vector<LayerWeights> layers_;
  Buffer staging_;                               // rows on their way to FP8, while loading
  std::map<const Linear*, float> input_scales_;  // the largest so far of those that share a matrix
  std::map<std::string, TensorSlot, std::less<>> waiting_;
  std::map<std::string, std::string, std::less<>> settled_;  // why no such tensor may come any more
};

}  // namespace gemma_cuda
