// Splits qkv, norms queries and keys where the model does, rotates them, and writes keys and values into the cache's
// pages (RopeArgs). A lane holds runs of neighbours of a head and those half a head further on, which it rotates with
// them, so nothing but the norm's sum crosses lanes. Bound by memory, at decode by latency.
//
// At decode all blocks have to be there before the product of q, k and v has ended, beside its blocks, and with what
// they need of tables and weights: else they would ask for that one after the other while nobody does anything else.
// Nor may they be in the way of attention's, which begin as soon as that product's are gone. So a warp has several
// heads where there would be more blocks than multiprocessors, and no more than 48 registers a thread.
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/rope.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kWarps = 8;
constexpr int kManyHeads = 3;  // a warp

// Of half a head a lane has so many neighbours.
template <int HeadDim>
constexpr int kRun = HeadDim < 64 ? 1 : HeadDim / 64;

template <int N>
struct alignas(N * sizeof(bf16_t)) Run {
  bf16_t x[N];
};

template <int N>
__device__ void widen(const Run<N>& from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = __bfloat162float(from.x[i]);
}

template <int N>
__device__ void store(bf16_t* to, const float (&x)[N]) {
  Run<N> run;
#pragma unroll
  for (int i = 0; i < N; ++i) run.x[i] = __float2bfloat16_rn(x[i]);
  *reinterpret_cast<Run<N>*>(to) = run;
}
__device__ void store(uint8_t* to, const float (&x)[1]) { *to = static_cast<uint8_t>(narrow_e4m3(x[0], 0)); }
__device__ void store(uint8_t* to, const float (&x)[2]) {
  *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(narrow_e4m3(x[0], x[1]));
}
__device__ void store(uint8_t* to, const float (&x)[4]) {
  *reinterpret_cast<uint32_t*>(to) = narrow_e4m3(x[0], x[1]) | narrow_e4m3(x[2], x[3]) << 16;
}

// What a block needs besides the product. It is older than the kernel before: all of it is asked for, and angles are
// computed, each by one thread, for sines are much code, while that one ends.
template <int HeadDim>
struct Tables {
  float2 angles[HeadDim / 2];  // sines and cosines of the token's
  float norms[2][HeadDim];     // of queries, of keys: 1 and weight

  __device__ void fill(const Rope& rope, uint32_t token) {
    static_assert(HeadDim <= kWarps * 32);
    const uint32_t i = threadIdx.x;
    if (i < HeadDim / 2)
      sincosf(static_cast<float>(rope.positions[token]) * rope.inverse_frequency[i], &angles[i].x, &angles[i].y);
    if (i < HeadDim && rope.q_norm != nullptr) norms[0][i] = 1 + rope.q_norm[i];
    if (i < HeadDim && rope.k_norm != nullptr) norms[1][i] = 1 + rope.k_norm[i];
  }
};

template <int HeadDim, class Cache, int Heads>
__global__ void __launch_bounds__(kWarps * 32) rope_kernel(const bf16_t* qkv, Rope rope) {
  constexpr int kHalf = HeadDim / 2, N = kRun<HeadDim>;
  __shared__ Tables<HeadDim> tables;
  allow_next();
  const uint32_t token = blockIdx.x, at = threadIdx.x % 32 * N;  // of half a head
  tables.fill(rope, token);
  const uint32_t all = rope.heads + 2 * rope.kv_heads, slot = rope.slots[token];
  const uint32_t first = (blockIdx.y * kWarps + threadIdx.x / 32) * Heads, row = cache_row(rope, slot);
  bool wanted[Heads];
  void* to[Heads];
  float factor[Heads];
#pragma unroll
  for (uint32_t i = 0; i < Heads; ++i) {
    const RopeHead head(rope, first + i);
    wanted[i] = head.head < all && (head.query || slot != kNoSlot);
    if (!wanted[i]) continue;
    to[i] = head.to(rope, token, row);
    factor[i] = head.factor(rope);
  }
  __syncthreads();
  wait_for_last();
  const bf16_t* in = qkv + (size_t{token} * all + first) * HeadDim + at;
  Run<N> low[Heads] = {}, high[Heads] = {};
#pragma unroll
  for (int i = 0; i < Heads; ++i)
    if (wanted[i] && at < kHalf) {
      low[i] = *reinterpret_cast<const Run<N>*>(in + i * HeadDim);
      high[i] = *reinterpret_cast<const Run<N>*>(in + i * HeadDim + kHalf);
    }
#pragma unroll
  for (uint32_t i = 0; i < Heads; ++i) {
    if (!wanted[i]) continue;
    const RopeHead head(rope, first + i);
    float x[N], y[N];
    widen(low[i], x), widen(high[i], y);
    if (head.norm(rope) != nullptr) {
      float squares = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) squares += x[j] * x[j] + y[j] * y[j];
      const float inverse = rsqrtf(warp_sum(squares) / HeadDim + rope.eps);
      const float* norm = tables.norms[head.query ? 0 : 1] + at % kHalf;
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] *= inverse * norm[j], y[j] *= inverse * norm[j + kHalf];
    }
    if (!head.value)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float2 angle = tables.angles[at % kHalf + j];
        rotate(x[j], y[j], angle.x, angle.y);
      }
    if (at >= kHalf) continue;
    if (head.query) {
      store(static_cast<bf16_t*>(to[i]) + at, x), store(static_cast<bf16_t*>(to[i]) + at + kHalf, y);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] *= factor[i], y[j] *= factor[i];
      store(static_cast<Cache*>(to[i]) + at, x), store(static_cast<Cache*>(to[i]) + at + kHalf, y);
    }
  }
}

template <int HeadDim, int Heads>
void launch(const RopeArgs& args, uint32_t warps, const Stream& stream) {
  const dim3 grid(args.tokens, (warps + kWarps - 1) / kWarps);
  launch_early(
      stream, grid, kWarps * 32, 0,
      args.cache.dtype == DType::e4m3 ? rope_kernel<HeadDim, uint8_t, Heads> : rope_kernel<HeadDim, bf16_t, Heads>,
      static_cast<const bf16_t*>(args.qkv), rope_of(args));
}

template <int HeadDim>
void launch(const RopeArgs& args, const DeviceInfo& device, const Stream& stream) {
  const uint32_t heads = args.heads + 2 * args.cache.kv_heads;
  if (args.tokens * ((heads + kWarps - 1) / kWarps) <= static_cast<uint32_t>(device.multiprocessors))
    launch<HeadDim, 1>(args, heads, stream);
  else
    launch<HeadDim, kManyHeads>(args, (heads + kManyHeads - 1) / kManyHeads, stream);
}

}  // namespace

void rope(const RopeArgs& args, const DeviceInfo& device, const Stream& stream) {
  switch (args.cache.head_dim) {
    case 16: return launch<16>(args, device, stream);
    case 32: return launch<32>(args, device, stream);
    case 64: return launch<64>(args, device, stream);
    case 128: return launch<128>(args, device, stream);
    case 256: return launch<256>(args, device, stream);
    default: throw Error::invalid_argument("head_dim " + std::to_string(args.cache.head_dim) + " has no CUDA kernel");
  }
}

}  // namespace gemma_cuda::cuda
