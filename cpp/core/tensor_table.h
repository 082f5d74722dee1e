// The one table of tensor names, shapes and the slots of the model they fill.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/spec.h"

namespace gemma_cuda {

// Where a tensor goes. Query, key and value share one matrix, gate and up another: one GEMM reads them at once.
enum class Slot {
  embedding,      // [vocab, hidden]
  final_norm,     // [hidden]
  lm_head,        // [vocab, hidden], only where not tied, or in FP8
  qkv,            // [(heads + 2 kv_heads) head_dim, hidden], rows from `row`
  attention_out,  // [hidden, heads head_dim]
  gate_up,        // [2 ffn, hidden], rows from `row`
  down,           // [hidden, ffn]
  q_norm,
  k_norm,  // [head_dim]
  pre_attention_norm,
  post_attention_norm,
  pre_mlp_norm,
  post_mlp_norm,  // [hidden]
};

// What of a slot's matrix a tensor holds.
enum class Part {
  values,
  scales,        // of its rows in FP8: one each, or one for all
  input_scale,   // of its inputs: one
  key_scales,    // of the cached keys (slot qkv): one for each K/V head, or one for all
  value_scales,  // of the cached values, likewise
};

struct TensorSlot {
  std::string name;             // canonical: "model.layers.0.self_attn.q_proj.weight", "…q_proj.weight_scale"
  std::vector<uint64_t> shape;  // row-major, [out, in] for matrices
  Slot slot;
  uint32_t layer = 0;
  uint64_t row = 0;  // first row of the slot's matrix that this tensor fills
  Part part = Part::values;
};

// Every tensor of the model, in the order of the forward pass. What is to be FP8 may come as such, with its scales
// right behind it, or in a wider type, to be quantized row by row as it is loaded; then it has no `scales`.
std::vector<TensorSlot> tensor_table(const ModelSpec& spec);

// "language_model.model.x", "model.language_model.x" -> "model.x"; nullopt for tensors of a vision tower or
// projector, which text generation leaves aside. "….k_proj.k_scale" and "….k_proj.output_scale" -> "….k_scale". Any
// other name comes back as it is.
std::optional<std::string> canonical_tensor_name(std::string_view name);

}  // namespace gemma_cuda
