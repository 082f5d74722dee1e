#include "core/tensor_table.h"

namespace gemma_cuda {
namespace {

// Gemma 1 names its second norm for where it stands (after attention); it is the norm before the MLP. Gemma 2 and 3
// have a real one after attention under that name.
void add_layer(std::vector<TensorSlot>& table, const ModelSpec& spec, uint32_t index) {
  const LayerSpec& layer = spec.layers[index];
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const uint64_t hidden = spec.hidden_size, ffn = spec.ffn_size, q = layer.q_width(), kv = layer.kv_width();
  auto add = [&](const char* name, std::vector<uint64_t> shape, Slot slot, uint64_t row = 0) {
    table.push_back({prefix + name + ".weight", std::move(shape), slot, index, row});
  };
  add("input_layernorm", {hidden}, Slot::pre_attention_norm);
  add("self_attn.q_proj", {q, hidden}, Slot::qkv);
  add("self_attn.k_proj", {kv, hidden}, Slot::qkv, q);
  add("self_attn.v_proj", {kv, hidden}, Slot::qkv, q + kv);
  if (layer.qk_norm) {
    add("self_attn.q_norm", {layer.head_dim}, Slot::q_norm);
    add("self_attn.k_norm", {layer.head_dim}, Slot::k_norm);
  }
  add("self_attn.o_proj", {hidden, q}, Slot::attention_out);
  if (layer.post_norms) {
    add("post_attention_layernorm", {hidden}, Slot::post_attention_norm);
    add("pre_feedforward_layernorm", {hidden}, Slot::pre_mlp_norm);
  } else {
    add("post_attention_layernorm", {hidden}, Slot::pre_mlp_norm);
  }
  add("mlp.gate_proj", {ffn, hidden}, Slot::gate_up);
  add("mlp.up_proj", {ffn, hidden}, Slot::gate_up, ffn);
  add("mlp.down_proj", {hidden, ffn}, Slot::down);
  if (layer.post_norms) add("post_feedforward_layernorm", {hidden}, Slot::post_mlp_norm);
}

}  // namespace

std::vector<TensorSlot> tensor_table(const ModelSpec& spec) {
  std::vector<TensorSlot> table;
  table.push_back({"model.embed_tokens.weight", {spec.vocab_size, spec.hidden_size}, Slot::embedding});
  for (uint32_t i = 0; i < spec.layers.size(); ++i) add_layer(table, spec, i);
  table.push_back({"model.norm.weight", {spec.hidden_size}, Slot::final_norm});
  if (!spec.tied_embeddings) table.push_back({"lm_head.weight", {spec.vocab_size, spec.hidden_size}, Slot::lm_head});
  return table;
}

std::optional<std::string> canonical_tensor_name(std::string_view name) {
  for (std::string_view tower : {"vision_tower.", "multi_modal_projector.", "embed_vision."})
    for (std::string_view prefix : {"", "model."})
      if (name.starts_with(prefix) && name.substr(prefix.size()).starts_with(tower)) return std::nullopt;
  for (std::string_view prefix : {"language_model.model.", "model.language_model."})
    if (name.starts_with(prefix)) return "model." + std::string(name.substr(prefix.size()));
  if (name.starts_with("language_model.lm_head.")) return std::string(name.substr(15));
  return std::string(name);
}

}  // namespace gemma_cuda
