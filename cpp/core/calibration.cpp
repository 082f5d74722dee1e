#include "core/calibration.h"

namespace gemma_cuda {
namespace {

// Calls f(name, groups) for each tensor, in one order.
template <class F>
void for_each_tensor(const ModelSpec& spec, F f) {
  for (uint32_t i = 0; i < spec.layers.size(); ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    f(layer + "self_attn.q_proj.input_scale", 1u);
    f(layer + "self_attn.k_scale", spec.layers[i].kv_heads);
    f(layer + "self_attn.v_scale", spec.layers[i].kv_heads);
    f(layer + "self_attn.o_proj.input_scale", 1u);
    f(layer + "mlp.gate_proj.input_scale", 1u);
    f(layer + "mlp.down_proj.input_scale", 1u);
  }
  f("lm_head.input_scale", 1u);
}

uint64_t all_groups(const ModelSpec& spec) {
  uint64_t groups = 0;
  for_each_tensor(spec, [&](const std::string&, uint32_t count) { groups += count; });
  return groups;
}

}  // namespace

Calibration::Calibration(Backend& backend, const ModelSpec& spec)
    : backend_(backend),
      spec_(spec),
      largest_(backend, all_groups(spec) * sizeof(float)),
      counts_(backend, all_groups(spec) * kMagnitudeBins * sizeof(uint64_t)) {
  const std::vector<uint64_t> zeros(all_groups(spec) * kMagnitudeBins);
  backend.upload(largest_.data(), zeros.data(), all_groups(spec) * sizeof(float));
  backend.upload(counts_.data(), zeros.data(), zeros.size() * sizeof(uint64_t));
  std::vector<Magnitudes> places;
  uint64_t at = 0;
  for_each_tensor(spec, [&](const std::string&, uint32_t groups) {
    places.push_back({largest_.as<float>() + at, counts_.as<uint64_t>() + at * kMagnitudeBins});
    at += groups;
  });
  for (size_t i = 0; i + 6 <= places.size(); i += 6)
    layers_.push_back({.qkv = places[i],
                       .attention_out = places[i + 3],
                       .gate_up = places[i + 4],
                       .down = places[i + 5],
                       .keys = places[i + 1],
                       .values = places[i + 2]});
  lm_head_ = places.back();
}

std::vector<Observation> Calibration::download() const {
  const uint64_t groups = all_groups(spec_);
  std::vector<float> largest(groups);
  std::vector<uint64_t> counts(groups * kMagnitudeBins);
  backend_.download(largest.data(), largest_.data(), largest.size() * sizeof(float));
  backend_.download(counts.data(), counts_.data(), counts.size() * sizeof(uint64_t));
  std::vector<Observation> out;
  uint64_t at = 0;
  for_each_tensor(spec_, [&](const std::string& name, uint32_t count) {
    const auto counted = counts.begin() + at * kMagnitudeBins;
    out.push_back(
        {name, {largest.begin() + at, largest.begin() + at + count}, {counted, counted + count * kMagnitudeBins}});
    at += count;
  });
  return out;
}

}  // namespace gemma_cuda
