#include "core/cost.h"

#include <algorithm>

namespace gemma_cuda {

CostModel::CostModel(const ModelSpec& spec, DType weights, DType act) : element_bytes_(size_of(weights)) {
  const uint64_t hidden = spec.hidden_size;
  for (const LayerSpec& layer : spec.layers) {
    layers_ += hidden * (layer.qkv_width() + layer.q_width() + 3 * uint64_t{spec.ffn_size});
    kv_bytes_[layer.window] += 2 * uint64_t{layer.kv_width()} * size_of(act);
  }
  lm_head_ = hidden * spec.vocab_size;
}

PassCost CostModel::of(const BatchPlan& plan) const {
  PassCost cost;
  const uint64_t rows = plan.logit_rows.size();
  cost.bytes = (layers_ + (rows > 0 ? lm_head_ : 0)) * element_bytes_;
  cost.flops = 2 * (layers_ * plan.cu_seqlens.back() + lm_head_ * rows);
  for (uint32_t i = 0; i < plan.sequences(); ++i) {
    const uint64_t fresh = plan.cu_seqlens[i + 1] - plan.cu_seqlens[i], length = plan.kv_len[i];
    for (const auto& [window, bytes] : kv_bytes_)
      cost.bytes += bytes * (window == 0 ? length : std::min(length, window + fresh - 1));
  }
  return cost;
}

}  // namespace gemma_cuda
