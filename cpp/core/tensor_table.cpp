#include "core/tensor_table.h"

namespace gemma_cuda {
namespace {

// A matrix and the scales that its scheme asks for.
void add_matrix(std::vector<TensorSlot>& table, Scheme scheme, const std::string& module, uint64_t rows, uint64_t cols,
                Slot slot, uint32_t layer, uint64_t row) {
  table.push_back({module + ".weight", {rows, cols}, slot, layer, row});
  if (kept_in_fp8(scheme)) table.push_back({module + ".weight_scale", {rows}, slot, layer, row, Part::scales});
  if (scheme == Scheme::fp8_static || scheme == Scheme::fp8_cast)
    table.push_back({module + ".input_scale", {1}, slot, layer, row, Part::input_scale});
}

// Gemma 1 names its second norm for where it stands (after attention); it is the norm before the MLP. Gemma 2 and 3
// have a real one after attention under that name.
void add_layer(std::vector<TensorSlot>& table, const ModelSpec& spec, uint32_t index) {
  const LayerSpec& layer = spec.layers[index];
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const uint64_t hidden = spec.hidden_size, ffn = spec.ffn_size, q = layer.q_width(), kv = layer.kv_width();
  auto matrix = [&](const char* name, Scheme scheme, uint64_t rows, uint64_t cols, Slot slot, uint64_t row = 0) {
    add_matrix(table, scheme, prefix + name, rows, cols, slot, index, row);
  };
  auto norm = [&](const char* name, uint64_t width, Slot slot) {
    table.push_back({prefix + name + ".weight", {width}, slot, index});
  };
  norm("input_layernorm", hidden, Slot::pre_attention_norm);
  matrix("self_attn.q_proj", layer.qkv, q, hidden, Slot::qkv);
  matrix("self_attn.k_proj", layer.qkv, kv, hidden, Slot::qkv, q);
  matrix("self_attn.v_proj", layer.qkv, kv, hidden, Slot::qkv, q + kv);
  if (layer.fp8_cache) {
    table.push_back({prefix + "self_attn.k_scale", {layer.kv_heads}, Slot::qkv, index, 0, Part::key_scales});
    table.push_back({prefix + "self_attn.v_scale", {layer.kv_heads}, Slot::qkv, index, 0, Part::value_scales});
  }
  if (layer.qk_norm) {
    norm("self_attn.q_norm", layer.head_dim, Slot::q_norm);
    norm("self_attn.k_norm", layer.head_dim, Slot::k_norm);
  }
  matrix("self_attn.o_proj", layer.attention_out, hidden, q, Slot::attention_out);
  if (layer.post_norms) {
    norm("post_attention_layernorm", hidden, Slot::post_attention_norm);
    norm("pre_feedforward_layernorm", hidden, Slot::pre_mlp_norm);
  } else {
    norm("post_attention_layernorm", hidden, Slot::pre_mlp_norm);
  }
  matrix("mlp.gate_proj", layer.gate_up, ffn, hidden, Slot::gate_up);
  matrix("mlp.up_proj", layer.gate_up, ffn, hidden, Slot::gate_up, ffn);
  matrix("mlp.down_proj", layer.down, hidden, ffn, Slot::down);
  if (layer.post_norms) norm("post_feedforward_layernorm", hidden, Slot::post_mlp_norm);
}

}  // namespace

std::vector<TensorSlot> tensor_table(const ModelSpec& spec) {
  std::vector<TensorSlot> table;
  table.push_back({"model.embed_tokens.weight", {spec.vocab_size, spec.hidden_size}, Slot::embedding});
  for (uint32_t i = 0; i < spec.layers.size(); ++i) add_layer(table, spec, i);
  table.push_back({"model.norm.weight", {spec.hidden_size}, Slot::final_norm});
  if (!spec.tied_embeddings || spec.lm_head != Scheme::plain)
    add_matrix(table, spec.lm_head, "lm_head", spec.vocab_size, spec.hidden_size, Slot::lm_head, 0, 0);
  return table;
}

std::optional<std::string> canonical_tensor_name(std::string_view name) {
  for (std::string_view tower : {"vision_tower.", "multi_modal_projector.", "embed_vision."})
    for (std::string_view prefix : {"", "model."})
      if (name.starts_with(prefix) && name.substr(prefix.size()).starts_with(tower)) return std::nullopt;
  std::string out(name);
  for (std::string_view prefix : {"language_model.model.", "model.language_model."})
    if (name.starts_with(prefix)) out = "model." + std::string(name.substr(prefix.size()));
  if (name.starts_with("language_model.lm_head.")) out = name.substr(15);
  // Scales of the cache are also named for the matrix that makes its keys or values.
  for (const auto& [theirs, ours] : {std::pair<std::string_view, const char*>{".k_proj.k_scale", ".k_scale"},
                                     {".k_proj.output_scale", ".k_scale"},
                                     {".v_proj.v_scale", ".v_scale"},
                                     {".v_proj.output_scale", ".v_scale"}})
    if (out.ends_with(theirs)) out.replace(out.size() - theirs.size(), theirs.size(), ours);
  return out;
}

}  // namespace gemma_cuda
