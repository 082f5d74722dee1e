#include "core/cost.h"

#include <algorithm>

namespace gemma_cuda {

CostModel::CostModel(const ModelSpec& spec, DType weights, DType act) {
  const uint64_t hidden = spec.hidden_size;
  auto add = [&](uint64_t& elements, uint64_t& bytes, Scheme scheme, uint64_t count) {
    elements += count;
    bytes += count * size_of(kept_in_fp8(scheme) ? DType::e4m3 : weights);
  };
  for (const LayerSpec& layer : spec.layers) {
    layers_ += last_, layer_bytes_ += last_bytes_;
    last_ = last_bytes_ = 0;
    add(layers_, layer_bytes_, layer.qkv, hidden * layer.qkv_width());
    add(last_, last_bytes_, layer.attention_out, hidden * layer.q_width());
    add(last_, last_bytes_, layer.gate_up, hidden * 2 * spec.ffn_size);
    add(last_, last_bytes_, layer.down, hidden * spec.ffn_size);
    kv_bytes_[layer.window] += 2 * uint64_t{layer.kv_width()} * size_of(layer.fp8_cache ? DType::e4m3 : act);
  }
  add(lm_head_, lm_head_bytes_, spec.lm_head, hidden * spec.vocab_size);
}

PassCost CostModel::of(const BatchPlan& plan) const {
  PassCost cost;
  const uint64_t rows = plan.logit_rows.size();
  cost.bytes = layer_bytes_ + (rows > 0 ? last_bytes_ + lm_head_bytes_ : 0);
  cost.flops = 2 * (layers_ * plan.cu_seqlens.back() + (last_ + lm_head_) * rows);
  for (uint32_t i = 0; i < plan.sequences(); ++i) {
    const uint64_t fresh = plan.cu_seqlens[i + 1] - plan.cu_seqlens[i], length = plan.kv_len[i];
    for (const auto& [window, bytes] : kv_bytes_)
      cost.bytes += bytes * (window == 0 ? length : std::min(length, window + fresh - 1));
  }
  return cost;
}

}  // namespace gemma_cuda
