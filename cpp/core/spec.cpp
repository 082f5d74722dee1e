#include "core/spec.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace gemma_cuda {
namespace {

// Far above any Gemma, far below where a product of two of them leaves 64 bits.
constexpr uint32_t kMaxWidth = 1u << 24;
constexpr uint32_t kMaxLayers = 1024;

void require(bool ok, const std::string& what) {
  if (!ok) throw Error::invalid_argument(what);
}

void in_range(const std::string& name, uint64_t value, uint64_t low, uint64_t high) {
  require(value >= low && value <= high,
          name + " is " + std::to_string(value) + ", outside " + std::to_string(low) + ".." + std::to_string(high));
}

void validate_layer(const LayerSpec& layer, uint32_t index) {
  const std::string where = "layer " + std::to_string(index) + ": ";
  in_range(where + "heads", layer.heads, 1, 65536);
  in_range(where + "kv_heads", layer.kv_heads, 1, layer.heads);
  in_range(where + "head_dim", layer.head_dim, 2, 4096);
  require(layer.heads % layer.kv_heads == 0, where + "kv_heads " + std::to_string(layer.kv_heads) +
                                                 " does not divide heads " + std::to_string(layer.heads));
  require(layer.head_dim % 2 == 0, where + "head_dim " + std::to_string(layer.head_dim) + " is odd");
  in_range(where + "query width", uint64_t{layer.heads} * layer.head_dim, 1, kMaxWidth);
  require(std::isfinite(layer.rope_theta) && layer.rope_theta > 0, where + "rope_theta must be positive");
  require(std::isfinite(layer.rope_factor) && layer.rope_factor > 0, where + "rope_factor must be positive");
  require(std::isfinite(layer.attention_scale) && layer.attention_scale > 0,
          where + "attention_scale must be positive");
  require(std::isfinite(layer.attention_soft_cap) && layer.attention_soft_cap >= 0,
          where + "attention_soft_cap must be 0 or positive");
}

}  // namespace

bool uses_fp8(const ModelSpec& spec) {
  const auto is = [](Scheme scheme) { return scheme != Scheme::plain; };
  return is(spec.lm_head) || std::ranges::any_of(spec.layers, [&](const LayerSpec& layer) {
           return is(layer.qkv) || is(layer.attention_out) || is(layer.gate_up) || is(layer.down) || layer.fp8_cache;
         });
}

void validate(const ModelSpec& spec) {
  require(spec.lm_head != Scheme::fp8_cast, "lm_head cannot be quantized for every product, only kept in FP8");
  in_range("vocab_size", spec.vocab_size, 1, 1u << 30);
  in_range("hidden_size", spec.hidden_size, 1, kMaxWidth);
  in_range("ffn_size", spec.ffn_size, 1, kMaxWidth);
  in_range("max_positions", spec.max_positions, 1, 1u << 30);
  in_range("number of layers", spec.layers.size(), 1, kMaxLayers);
  require(std::isfinite(spec.rms_norm_eps) && spec.rms_norm_eps >= 0, "rms_norm_eps must be 0 or positive");
  require(std::isfinite(spec.final_soft_cap) && spec.final_soft_cap >= 0, "final_soft_cap must be 0 or positive");
  for (uint32_t i = 0; i < spec.layers.size(); ++i) validate_layer(spec.layers[i], i);
}

}  // namespace gemma_cuda
