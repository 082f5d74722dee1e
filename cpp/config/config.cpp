#include "config/config.h"

#include <cmath>
#include <string>

#include "config/fields.h"

namespace gemma_cuda {
namespace {

enum class Family : uint8_t { gemma1, gemma2, gemma3 };

std::string between(char mark, std::string_view text) {
  std::string out(1, mark);
  return out.append(text) += mark;
}
std::string quoted(std::string_view text) { return between('"', text); }
std::string member(std::string_view name) { return between('`', name); }

Family family_of(const Fields& top) {
  const std::string known = "known: gemma, gemma2, gemma3, gemma3_text";
  const std::optional<std::string> name = top.string("model_type");
  if (!name) Fields::fail("`model_type` is missing; " + known);
  if (*name == "gemma") return Family::gemma1;
  if (*name == "gemma2") return Family::gemma2;
  if (*name == "gemma3" || *name == "gemma3_text") return Family::gemma3;
  Fields::fail("`model_type` " + quoted(*name) + " is not supported; " + known);
}

// Where a model that sees as well has what concerns its text.
Fields text_model(const Fields& top) {
  if (*top.string("model_type") != "gemma3") return top;
  const std::optional<Fields> text = top.object("text_config");
  if (!text) Fields::fail("`model_type` \"gemma3\" without a `text_config`");
  return *text;
}

// What would change the computation in ways this engine does not know.
void refuse_unsupported(const Fields& fields) {
  for (const char* name : {"attention_bias", "use_bidirectional_attention"})
    if (fields.boolean(name) == true)
      Fields::fail(member(name) + " true is not supported; no published Gemma text model has it");
  // Gemma means the tanh form of GELU under every name it was given, "gelu" of the first configs among them.
  for (const char* name : {"hidden_act", "hidden_activation"}) {
    const std::optional<std::string> act = fields.string(name);
    if (act && *act != "gelu" && *act != "gelu_pytorch_tanh" && *act != "gelu_new" && *act != "gelu_fast" &&
        *act != "gelu_tanh")
      Fields::fail(member(name) + " " + quoted(*act) + " is not a GELU, which every Gemma has");
  }
}

// Absent means the class default of Gemma 2, null means none.
float soft_cap(Family family, const Fields& fields, std::string_view name, float gemma2_default) {
  if (const std::optional<double> cap = fields.positive(name)) return static_cast<float>(*cap);
  return family == Family::gemma2 && !fields.has(name) ? gemma2_default : 0.0f;
}

// Which layers see only a window: named one by one, or all but every so-manieth.
std::vector<bool> local_layers(Family family, const Fields& fields, uint32_t layers) {
  std::vector<bool> local(layers, false);
  if (family == Family::gemma1) return local;
  if (const auto kinds = fields.strings("layer_types")) {
    if (kinds->size() != layers)
      Fields::fail("`layer_types` names " + std::to_string(kinds->size()) + " layers of " + std::to_string(layers));
    for (uint32_t i = 0; i < layers; ++i) {
      const std::string& kind = (*kinds)[i];
      if (kind != "sliding_attention" && kind != "full_attention")
        Fields::fail("`layer_types` holds " + quoted(kind) +
                     "; known are \"sliding_attention\" and \"full_attention\"");
      local[i] = kind == "sliding_attention";
    }
    return local;
  }
  std::optional<uint32_t> pattern = fields.count("sliding_window_pattern");
  if (!pattern) pattern = fields.count("_sliding_window_pattern");
  const uint32_t every = pattern.value_or(family == Family::gemma2 ? 2 : 6);
  if (every == 0) Fields::fail("`sliding_window_pattern` is 0; it counts layers and starts at 1");
  for (uint32_t i = 0; i < layers; ++i) local[i] = (i + 1) % every != 0;
  return local;
}

struct Rope {
  double theta, factor;
};

Rope rope_of(const Fields& fields, double default_theta) {
  std::optional<std::string> kind = fields.string("rope_type");
  if (!kind) kind = fields.string("type");
  double factor = 1;
  if (kind == "linear") {
    const std::optional<double> given = fields.positive("factor");
    if (!given) Fields::fail("linear RoPE scaling without a `factor`");
    factor = *given;
  } else if (kind && *kind != "default") {
    Fields::fail("RoPE type " + quoted(*kind) + " is not supported; known are \"default\" and \"linear\"");
  }
  return {fields.positive("rope_theta").value_or(default_theta), factor};
}

struct Ropes {
  Rope global, local;
};

// Old: `rope_theta`, `rope_local_base_freq`, `rope_scaling`, which concerns global layers only. New: `rope_parameters`,
// flat for Gemma 1 and 2, one for each kind of layer in Gemma 3.
Ropes ropes_of(Family family, const Fields& fields) {
  const bool gemma3 = family == Family::gemma3;
  const double default_theta = gemma3 ? 1e6 : 1e4;
  const auto old_local = [&] { return Rope{fields.positive("rope_local_base_freq").value_or(1e4), 1}; };
  if (const std::optional<Fields> parameters = fields.object("rope_parameters")) {
    const std::optional<Fields> full = parameters->object("full_attention");
    const std::optional<Fields> sliding = parameters->object("sliding_attention");
    const Rope global = rope_of(full.value_or(*parameters), default_theta);
    return {global, sliding ? rope_of(*sliding, 1e4) : gemma3 ? old_local() : global};
  }
  const double theta = fields.positive("rope_theta").value_or(default_theta);
  const std::optional<Fields> scaling = fields.object("rope_scaling");
  const Rope global{theta, scaling ? rope_of(*scaling, theta).factor : 1};
  return {global, gemma3 ? old_local() : global};
}

std::vector<LayerSpec> layers_of(Family family, const Fields& fields, uint32_t layers, uint32_t heads,
                                 uint32_t kv_heads) {
  const uint32_t head_dim = fields.count("head_dim").value_or(256);
  const double scalar = family == Family::gemma1 ? head_dim : fields.positive("query_pre_attn_scalar").value_or(256.0);
  // Null is no window; absent is the class default.
  const uint32_t window = family == Family::gemma1       ? 0
                          : fields.has("sliding_window") ? fields.count("sliding_window").value_or(0)
                                                         : 4096;
  const float cap = soft_cap(family, fields, "attn_logit_softcapping", 50);
  const Ropes ropes = ropes_of(family, fields);
  std::vector<LayerSpec> out;
  for (const bool local : local_layers(family, fields, layers)) {
    const Rope& rope = local ? ropes.local : ropes.global;
    out.push_back({.window = local ? window : 0,
                   .rope_theta = rope.theta,
                   .rope_factor = rope.factor,
                   .heads = heads,
                   .kv_heads = kv_heads,
                   .head_dim = head_dim,
                   .attention_scale = static_cast<float>(std::pow(scalar, -0.5)),
                   .attention_soft_cap = cap,
                   .post_norms = family != Family::gemma1,
                   .qk_norm = family == Family::gemma3});
  }
  return out;
}

ModelSpec spec_of(Family family, const Fields& fields, const Fields& top) {
  const bool gemma3 = family == Family::gemma3;
  // Gemma 3 configs leave out what equals the class defaults.
  const auto count = [&](std::string_view name, uint32_t otherwise) {
    return gemma3 ? fields.count(name).value_or(otherwise) : fields.required_count(name);
  };
  const uint32_t layers = count("num_hidden_layers", 26);
  if (layers < 1 || layers > 1024)
    Fields::fail("`num_hidden_layers` is " + std::to_string(layers) + ", outside 1..1024");
  std::optional<bool> tied = fields.boolean("tie_word_embeddings");
  if (!tied) tied = top.boolean("tie_word_embeddings");
  ModelSpec spec;
  spec.vocab_size = count("vocab_size", 262'208);
  spec.hidden_size = count("hidden_size", 2304);
  spec.ffn_size = count("intermediate_size", 9216);
  spec.max_positions = fields.count("max_position_embeddings").value_or(gemma3 ? 131'072 : 8192);
  spec.rms_norm_eps = static_cast<float>(fields.positive("rms_norm_eps").value_or(1e-6));
  spec.final_soft_cap = soft_cap(family, fields, "final_logit_softcapping", 30);
  spec.tied_embeddings = tied.value_or(true);
  const uint32_t heads = count("num_attention_heads", 8);
  spec.layers = layers_of(family, fields, layers, heads, count("num_key_value_heads", 4));
  validate(spec);
  return spec;
}

}  // namespace

ModelConfig parse_config(std::string_view json) {
  const Json whole = Json::parse(json);
  if (whole.kind() != Json::Kind::object) Fields::fail("the top level is not a JSON object");
  const Fields top(whole);
  const Family family = family_of(top);
  const Fields fields = text_model(top);
  refuse_unsupported(top);
  refuse_unsupported(fields);
  return {spec_of(family, fields, top), fields.has("vocab_size")};
}

}  // namespace gemma_cuda
