// What passes must read and compute, against sums made by hand.
#include "check.h"
#include "core/cost.h"

using namespace gemma_cuda;

int main() {
  ModelSpec spec;
  spec.vocab_size = 100;
  spec.hidden_size = 8;
  spec.ffn_size = 16;
  LayerSpec layer;
  layer.heads = 2;
  layer.kv_heads = 1;
  layer.head_dim = 4;
  spec.layers = {layer, layer, layer};
  spec.layers[1].window = 6;
  // Of a layer: 8 x (8 + 4 + 4) for QKV, 8 x 8 for its output, 3 x 8 x 16 for the MLP.
  const uint64_t layers = 3 * (128 + 64 + 384), lm_head = 800, token = 2 * 4 * 2;  // bytes of a token in a layer
  const uint64_t last = 64 + 384;  // what only logits need of the last layer
  const CostModel cost(spec, DType::bf16, DType::bf16);

  BatchPlan plan;
  plan.ids = {1, 2, 3, 4, 0};  // the last belongs to no sequence
  plan.cu_seqlens = {0, 3, 4};
  plan.kv_len = {20, 5};
  // A layer without a window sees all; with one of 6, the first sequence's 3 tokens see 8, the other sees all it has.
  const uint64_t cached = token * (2 * (20 + 5) + 8 + 5);
  CHECK(cost.of(plan).bytes == 2 * (layers - last) + cached);
  CHECK(cost.of(plan).flops == 2 * 4 * (layers - last));
  plan.logit_rows = {2, 3};
  CHECK(cost.of(plan).bytes == 2 * (layers + lm_head) + cached);
  CHECK(cost.of(plan).flops == 2 * (4 * (layers - last) + 2 * (last + lm_head)));
  CHECK(CostModel(spec, DType::f32, DType::f32).of(plan).bytes == 2 * cost.of(plan).bytes);
  CostModel packed = cost;
  packed.lm_head_is(1200);
  CHECK(packed.of(plan).bytes == cost.of(plan).bytes - 400 && packed.of(plan).flops == cost.of(plan).flops);

  spec.layers[0].gate_up = Scheme::fp8_static;  // 2 x 8 x 16 elements of one byte instead of two
  spec.layers[2].fp8_cache = true;
  spec.lm_head = Scheme::fp8_dynamic;
  const uint64_t less = 256 + (20 + 5) * token / 2 + lm_head;
  CHECK(CostModel(spec, DType::bf16, DType::bf16).of(plan).bytes == cost.of(plan).bytes - less);
  CHECK(CostModel(spec, DType::bf16, DType::bf16).of(plan).flops == cost.of(plan).flops);
}
