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
  void* keys;  // bf16, or FP8 with scales
  void* values;
  const float* key_scales;
  const float* value_scales;
};

// Where the token's row of this K/V head begins.
template <int HeadDim>
__device__ size_t cache_row(const Rope& args, uint32_t slot, uint32_t kv_head) {
  const size_t page = slot / args.page_size;
  return ((page * args.kv_heads + kv_head) * args.page_size + slot % args.page_size) * HeadDim;
}

// A pair of elements, HeadDim / 2 apart.
template <int HeadDim>
__device__ void store_pair(bf16_t* to, float low, float high) {
  to[0] = __float2bfloat16_rn(low);
  to[HeadDim / 2] = __float2bfloat16_rn(high);
}
template <int HeadDim>
__device__ void store_pair(uint8_t* to, float low, float high) {
  const uint32_t both = narrow_e4m3(low, high);
  to[0] = static_cast<uint8_t>(both);
  to[HeadDim / 2] = static_cast<uint8_t>(both >> 8);
}

template <int HeadDim, class Cache>
__global__ void __launch_bounds__(kWarps * 32) rope_kernel(Rope args) {
  constexpr int kHalf = HeadDim / 2, kPairs = (kHalf + 31) / 32;
  allow_next();
  const uint32_t token = blockIdx.x, lane = threadIdx.x % 32;
  const uint32_t head = blockIdx.y * kWarps + threadIdx.x / 32;  // queries, then keys, then values
  const uint32_t all = args.heads + 2 * args.kv_heads;
  const bool query = head < args.heads, value = head >= args.heads + args.kv_heads;
  if (head >= all || (!query && args.slots[token] == kNoSlot)) return wait_for_last();
  // Angles come of tables, which are older than the kernel before: they are computed while that one ends.
  float sine[kPairs], cosine[kPairs];
  if (!value) {
    const float position = static_cast<float>(args.positions[token]);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t at = i * 32 + lane;
      sincosf(at < kHalf ? position * args.inverse_frequency[at] : 0, &sine[i], &cosine[i]);
    }
  }
  wait_for_last();
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
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float rotated = low[i] * cosine[i] - high[i] * sine[i];
      high[i] = high[i] * cosine[i] + low[i] * sine[i];
      low[i] = rotated;
    }
  }
  const auto store = [&](auto* out, float factor) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t at = i * 32 + lane;
      if (at < kHalf) store_pair<HeadDim>(out + at, low[i] * factor, high[i] * factor);
    }
  };
  if (query) return store(args.q + (size_t{token} * args.heads + head) * HeadDim, 1.0f);
  const uint32_t kv_head = (head - args.heads) % args.kv_heads;
  const float* scales = value ? args.value_scales : args.key_scales;
  store(static_cast<Cache*>(value ? args.values : args.keys) + cache_row<HeadDim>(args, args.slots[token], kv_head),
        scales != nullptr ? 1.0f / scales[kv_head] : 1.0f);
}

template <int HeadDim>
void launch(const Rope& rope, dim3 grid, DType cache, const Stream& stream) {
  launch_early(stream, grid, kWarps * 32, 0,
               cache == DType::e4m3 ? rope_kernel<HeadDim, uint8_t> : rope_kernel<HeadDim, bf16_t>, rope);
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
                  args.cache.keys,
                  args.cache.values,
                  args.cache.key_scales,
                  args.cache.value_scales};
  const dim3 grid(args.tokens, (args.heads + 2 * args.cache.kv_heads + kWarps - 1) / kWarps);
  switch (args.cache.head_dim) {
    case 16: return launch<16>(rope, grid, args.cache.dtype, stream);
    case 32: return launch<32>(rope, grid, args.cache.dtype, stream);
    case 64: return launch<64>(rope, grid, args.cache.dtype, stream);
    case 128: return launch<128>(rope, grid, args.cache.dtype, stream);
    case 256: return launch<256>(rope, grid, args.cache.dtype, stream);
    default: throw Error::invalid_argument("head_dim " + std::to_string(args.cache.head_dim) + " has no CUDA kernel");
  }
}

}  // namespace gemma_cuda::cuda
