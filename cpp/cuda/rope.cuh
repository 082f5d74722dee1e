// What the kernels that rotate have in common: where positions come from, and where queries, keys and values go.
#pragma once

#include "cuda/vector.cuh"
#include "ops/backend.h"

namespace gemma_cuda::cuda {

// Of RopeArgs all but the product.
struct Rope {
  const uint32_t* positions;
  const uint32_t* slots;
  const float* inverse_frequency;
  const float* q_norm;
  const float* k_norm;
  float eps;
  uint32_t heads, kv_heads, head_dim, page_size;
  bf16_t* q;
  void* keys;  // bf16, or FP8 with scales
  void* values;
  bool fp8_cache;
  const float* key_scales;
  const float* value_scales;
};

inline Rope rope_of(const RopeArgs& args) {
  const KvLayer& cache = args.cache;
  return {args.positions,
          args.slots,
          args.inverse_frequency,
          args.q_norm,
          args.k_norm,
          args.eps,
          args.heads,
          cache.kv_heads,
          cache.head_dim,
          cache.page_size,
          static_cast<bf16_t*>(args.q),
          cache.keys,
          cache.values,
          cache.dtype == DType::e4m3,
          cache.key_scales,
          cache.value_scales};
}

// The cache's row of a slot's first K/V head; the others' follow by page_size. A cache has fewer than 2^32.
__device__ inline uint32_t cache_row(const Rope& rope, uint32_t slot) {
  const uint32_t page = slot / rope.page_size;
  return page * rope.kv_heads * rope.page_size + (slot - page * rope.page_size);
}

// What a head of the product is: queries come first, then keys, then values.
struct RopeHead {
  uint32_t head, kv_head;
  bool query, value;

  __device__ RopeHead(const Rope& rope, uint32_t of_product)
      : head(of_product),
        kv_head(of_product - rope.heads),
        query(of_product < rope.heads),
        value(of_product >= rope.heads + rope.kv_heads) {
    if (value) kv_head -= rope.kv_heads;
  }

  __device__ bool fp8(const Rope& rope) const { return !query && rope.fp8_cache; }
  __device__ const float* norm(const Rope& rope) const { return query ? rope.q_norm : value ? nullptr : rope.k_norm; }
  // What FP8 is multiplied by.
  __device__ float factor(const Rope& rope) const {
    const float* scales = value ? rope.value_scales : rope.key_scales;
    return !query && scales != nullptr ? 1.0f / scales[kv_head] : 1.0f;
  }
  // Where it goes for a token, whose row of the cache cache_row() gives.
  __device__ void* to(const Rope& rope, uint32_t token, uint32_t row) const {
    if (query) return rope.q + (size_t{token} * rope.heads + head) * rope.head_dim;
    char* const base = static_cast<char*>(value ? rope.values : rope.keys);
    return base + (size_t{row} + kv_head * rope.page_size) * rope.head_dim * (rope.fp8_cache ? 1 : sizeof(bf16_t));
  }
};

// Of a pair of elements, half a head apart.
__device__ inline void rotate(float& low, float& high, float sine, float cosine) {
  const float rotated = low * cosine - high * sine;
  high = high * cosine + low * sine;
  low = rotated;
}

}  // namespace gemma_cuda::cuda
