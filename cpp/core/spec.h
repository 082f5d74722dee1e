// The model as data: Gemma 1, 2 and 3 differ only in these numbers.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gemma_cuda {

// How a matrix is kept and what it is multiplied with.
enum class Scheme : uint8_t {
  plain,        // as the engine's options say, bf16 or f32
  fp8_static,   // in E4M3 with a scale for each row; its inputs too, with one scale that calibration has found
  fp8_dynamic,  // in E4M3 with a scale for each row; its inputs too, each token with a scale of its own
  fp8_cast,     // as plain, and quantized anew for every product, inputs as in fp8_static: for comparison only
};

struct LayerSpec {
  uint32_t window = 0;              // tokens, the query itself among them; 0: full attention
  double rope_theta = 10000.0;      // base frequency
  double rope_factor = 1.0;         // linear scaling: positions are divided by it
  uint32_t heads = 0;               // query heads
  uint32_t kv_heads = 0;            // divides heads
  uint32_t head_dim = 0;            // even
  float attention_scale = 0.0f;     // on query-key products
  float attention_soft_cap = 0.0f;  // after the scale, before the mask; 0: none
  bool post_norms = false;          // norms after the blocks too (Gemma 2, 3)
  bool qk_norm = false;             // norms over head_dim on q and k, before RoPE (Gemma 3)
  Scheme qkv = Scheme::plain, attention_out = Scheme::plain, gate_up = Scheme::plain, down = Scheme::plain;
  bool fp8_cache = false;  // keys and values in E4M3, with a scale for each K/V head

  uint32_t q_width() const { return heads * head_dim; }
  uint32_t kv_width() const { return kv_heads * head_dim; }
  uint32_t qkv_width() const { return q_width() + 2 * kv_width(); }
};

struct ModelSpec {
  uint32_t vocab_size = 0;     // rows of the embedding
  uint32_t hidden_size = 0;    // width of the residual stream
  uint32_t ffn_size = 0;       // width of the MLP
  uint32_t max_positions = 0;  // longest sequence
  float rms_norm_eps = 1e-6f;
  float final_soft_cap = 0.0f;  // on the logits; 0: none
  bool tied_embeddings = true;  // the output embedding is the input embedding
  // Of the output embedding; with FP8 it is a matrix of its own, whether tied or not.
  Scheme lm_head = Scheme::plain;
  std::vector<LayerSpec> layers;
};

// Whether a matrix is kept in FP8.
constexpr bool kept_in_fp8(Scheme scheme) { return scheme == Scheme::fp8_static || scheme == Scheme::fp8_dynamic; }
// Whether anything is kept or computed in FP8.
bool uses_fp8(const ModelSpec& spec);

// Throws Error::invalid_argument naming the number that cannot be.
void validate(const ModelSpec& spec);

}  // namespace gemma_cuda
