// Splits qkv, norms queries and keys where the model does, rotates them, and writes keys and values into the cache's
// pages (RopeArgs). One warp a head of a token; a lane holds the pairs (i, i + head_dim / 2) it rotates, so nothing
// but the norm's sum crosses lanes. Bound by memory, at decode by the launch.
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/vector.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kWarps = 8;

struct Rope {
  const bf16_t* qkv;
  const uint32_t* positions;
  const uint32_t* slots;
  const float* inverse_frequency;
  const float* q_norm;
  const float* k_norm;
  float eps;
  uint32_t heads, kv_heads, page_size;
  bf16_t* q;
  bf16_t* keys;
  bf16_t* values;
};

// Where the token's row of this K/V head begins.
template <int HeadDim>
__device__ size_t cache_row(const Rope& args, uint32_t slot, uint32_t kv_head) {
  const size_t page = slot / args.page_size;
  return ((page * args.kv_heads + kv_head) * args.page_size + slot % args.page_size) * HeadDim;
}

template <int HeadDim>
__global__ void __launch_bounds__(kWarps * 32) rope_kernel(Rope args) {
  constexpr int kHalf = HeadDim / 2, kPairs = (kHalf + 31) / 32;
  allow_next();
  wait_for_last();
  const uint32_t token = blockIdx.x, lane = threadIdx.x % 32;
  const uint32_t head = blockIdx.y * kWarps + threadIdx.x / 32;  // queries, then keys, then values
  const uint32_t all = args.heads + 2 * args.kv_heads;
  const bool query = head < args.heads, value = head >= args.heads + args.kv_heads;
  if (head >= all || (!query && args.slots[token] == kNoSlot)) return;
  const bf16_t* in = args.qkv + (size_t{token} * all + head) * HeadDim;

  float low[kPairs], high[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t at = i * 32 + lane;
    low[i] = at < kHalf ? __bfloat162float(in[at]) : 0;
    high[i] = at < kHalf ? __bfloat162float(in[at + kHalf]) : 0;
  }
  if (!value) {
    if (const float* weight = query ? args.q_norm : args.k_norm) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) squares += low[i] * low[i] + high[i] * high[i];
      const float inverse = rsqrtf(warp_sum(squares) / HeadDim + args.eps);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const uint32_t at = i * 32 + lane;
        if (at >= kHalf) continue;
        low[i] *= inverse * (1 + weight[at]);
        high[i] *= inverse * (1 + weight[at + kHalf]);
      }
    }
    const float position = static_cast<float>(args.positions[token]);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t at = i * 32 + lane;
      float sine, cosine;
      sincosf(at < kHalf ? position * args.inverse_frequency[at] : 0, &sine, &cosine);
      const float rotated = low[i] * cosine - high[i] * sine;
      high[i] = high[i] * cosine + low[i] * sine;
      low[i] = rotated;
    }
  }
  bf16_t* out;
  if (query)
    out = args.q + (size_t{token} * args.heads + head) * HeadDim;
  else
    out = (value ? args.values : args.keys) +
          cache_row<HeadDim>(args, args.slots[token], (head - args.heads) % args.kv_heads);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t at = i * 32 + lane;
    if (at >= kHalf) continue;
    out[at] = __float2bfloat16_rn(low[i]);
    out[at + kHalf] = __float2bfloat16_rn(high[i]);
  }
}

}  // namespace

void rope(const RopeArgs& args, const Stream& stream) {
  const Rope rope{static_cast<const bf16_t*>(args.qkv),
                  args.positions,
                  args.slots,
                  args.inverse_frequency,
                  args.q_norm,
                  args.k_norm,
                  args.eps,
                  args.heads,
                  args.cache.kv_heads,
                  args.cache.page_size,
                  static_cast<bf16_t*>(args.q),
                  static_cast<bf16_t*>(args.cache.keys),
                  static_cast<bf16_t*>(args.cache.values)};
  const dim3 grid(args.tokens, (args.heads + 2 * args.cache.kv_heads + kWarps - 1) / kWarps);
  switch (args.cache.head_dim) {
    case 16: launch_early(stream, grid, kWarps * 32, 0, rope_kernel<16>, rope); break;
    case 32: launch_early(stream, grid, kWarps * 32, 0, rope_kernel<32>, rope); break;
    case 64: launch_early(stream, grid, kWarps * 32, 0, rope_kernel<64>, rope); break;
    case 128: launch_early(stream, grid, kWarps * 32, 0, rope_kernel<128>, rope); break;
    case 256: launch_early(stream, grid, kWarps * 32, 0, rope_kernel<256>, rope); break;
    default: throw Error::invalid_argument("head_dim " + std::to_string(args.cache.head_dim) + " has no CUDA kernel");
  }
}

}  // namespace gemma_cuda::cuda
