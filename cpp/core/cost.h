// What a forward pass must read and compute at least, counted on the host from its plan: the measure of how fast it
// could have been.
#pragma once

#include <cstdint>
#include <map>

#include "core/plan.h"
#include "core/spec.h"
#include "ops/dtype.h"

namespace gemma_cuda {

struct PassCost {
  // Read once: every matrix of the layers, the output embedding where there are logits, and the keys and values that
  // the new tokens of each sequence see. Behind the keys and values of the last layer nothing is due but for logits.
  uint64_t bytes = 0;
  // Of the products with these matrices, a multiplication and an addition an element and row. Attention's come on top.
  uint64_t flops = 0;
};

class CostModel {
 public:
  CostModel(const ModelSpec& spec, DType weights, DType act);

  // The output embedding is read in so many bytes, not its own.
  void lm_head_is(uint64_t bytes) { lm_head_bytes_ = bytes; }

  // Rows that belong to no sequence cost nothing: nothing of them must be computed.
  PassCost of(const BatchPlan& plan) const;

 private:
  uint64_t layers_ = 0, layer_bytes_ = 0;     // elements of the layers' matrices, but for those
  uint64_t last_ = 0, last_bytes_ = 0;        // of the last one that only logits need
  uint64_t lm_head_ = 0, lm_head_bytes_ = 0;  // of the output embedding
  std::map<uint32_t, uint64_t> kv_bytes_;     // of a cached token, in all layers with this window
};

}  // namespace gemma_cuda
