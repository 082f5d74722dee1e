// Splits qkv, norms queries and keys where the model does, rotates them, and writes keys and values into the cache's
// pages (RopeArgs). One warp a head of a token; a lane holds the pairs (i, i + head_dim / 2) it rotates, so nothing
// but the norm's sum crosses lanes. Bound by memory, at decode by the launch.
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/rope.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kWarps = 8;

// A pair of elements, half a head apart.
template <int Half>
__device__ void store_pair(bf16_t* to, float low, float high) {
  to[0] = __float2bfloat16_rn(low);
  to[Half] = __float2bfloat16_rn(high);
}
template <int Half>
__device__ void store_pair(uint8_t* to, float low, float high) {
  const uint32_t both = narrow_e4m3(low, high);
  to[0] = static_cast<uint8_t>(both);
  to[Half] = static_cast<uint8_t>(both >> 8);
}

template <int HeadDim, class Cache>
__global__ void __launch_bounds__(kWarps * 32) rope_kernel(const bf16_t* qkv, Rope rope) {
  constexpr uint32_t kHalf = HeadDim / 2;
  constexpr int kPairs = (kHalf + 31) / 32;
  static_assert(kHalf <= kWarps * 32);
  __shared__ float2 angles[kHalf];  // sines and cosines of the token's
  allow_next();
  const uint32_t token = blockIdx.x, lane = threadIdx.x % 32;
  // Angles come of tables, which are older than the kernel before: they are computed while that one ends, each by one
  // thread, for sines are much code.
  if (threadIdx.x < kHalf)
    sincosf(static_cast<float>(rope.positions[token]) * rope.inverse_frequency[threadIdx.x], &angles[threadIdx.x].x,
            &angles[threadIdx.x].y);
  __syncthreads();
  const RopeHead head(rope, blockIdx.y * kWarps + threadIdx.x / 32);
  const uint32_t all = rope.heads + 2 * rope.kv_heads;
  if (head.head >= all || (!head.query && rope.slots[token] == kNoSlot)) return wait_for_last();
  // The model's scales and weights, too, are asked for before the wait: a step reads more than the L2 cache holds.
  void* const to = head.to(rope, token, head.query ? 0 : cache_row(rope, rope.slots[token]));
  const float cache_factor = head.factor(rope);
  const float* const weight = head.norm(rope);
  float low_weight[kPairs], high_weight[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t at = i * 32 + lane;
    low_weight[i] = weight != nullptr && at < kHalf ? weight[at] : 0;
    high_weight[i] = weight != nullptr && at < kHalf ? weight[at + kHalf] : 0;
  }
  wait_for_last();
  const bf16_t* in = qkv + (size_t{token} * all + head.head) * HeadDim;

  float low[kPairs], high[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t at = i * 32 + lane;
    low[i] = at < kHalf ? __bfloat162float(in[at]) : 0;
    high[i] = at < kHalf ? __bfloat162float(in[at + kHalf]) : 0;
  }
  if (!head.value) {
    if (weight != nullptr) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) squares += low[i] * low[i] + high[i] * high[i];
      const float inverse = rsqrtf(warp_sum(squares) / HeadDim + rope.eps);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        low[i] *= inverse * (1 + low_weight[i]);
        high[i] *= inverse * (1 + high_weight[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 angle = angles[min(i * 32 + lane, kHalf - 1)];
      rotate(low[i], high[i], angle.x, angle.y);
    }
  }
  const auto store = [&](auto* out, float factor) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t at = i * 32 + lane;
      if (at < kHalf) store_pair<kHalf>(out + at, low[i] * factor, high[i] * factor);
    }
  };
  head.query ? store(static_cast<bf16_t*>(to), 1.0f) : store(static_cast<Cache*>(to), cache_factor);
}

template <int HeadDim>
void launch(const RopeArgs& args, const Stream& stream) {
  const dim3 grid(args.tokens, (args.heads + 2 * args.cache.kv_heads + kWarps - 1) / kWarps);
  launch_early(stream, grid, kWarps * 32, 0,
               args.cache.dtype == DType::e4m3 ? rope_kernel<HeadDim, uint8_t> : rope_kernel<HeadDim, bf16_t>,
               static_cast<const bf16_t*>(args.qkv), rope_of(args));
}

}  // namespace

void rope(const RopeArgs& args, const Stream& stream) {
  switch (args.cache.head_dim) {
    case 16: return launch<16>(args, stream);
    case 32: return launch<32>(args, stream);
    case 64: return launch<64>(args, stream);
    case 128: return launch<128>(args, stream);
    case 256: return launch<256>(args, stream);
    default: throw Error::invalid_argument("head_dim " + std::to_string(args.cache.head_dim) + " has no CUDA kernel");
  }
}

}  // namespace gemma_cuda::cuda
