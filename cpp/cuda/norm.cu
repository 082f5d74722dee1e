// RMS norm with what stands around it in a layer (NormArgs): the block's output is normed and added to the residual
// stream, and the stream normed for the next block, in one pass over memory.
//
// One block a row; a thread keeps its elements in registers between the two sums, so each byte moves once: 2 bytes of
// delta and 4 of residual read, 4 and 2 (1 as FP8) written an element. At the few rows of decode it is bound by
// latency.
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/quantize.cuh"
#include "cuda/vector.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kVector = 8;

struct Norm {
  float* residual;
  const bf16_t* delta;
  const float* delta_weight;
  const uint32_t* rows;
  const float* weight;
  void* out;  // bf16, or FP8 with `quantize`
  uint32_t hidden;
  float eps;
  Quantize quantize;
  bool fp8;
};

// Where a thread's i-th run of elements begins.
__device__ uint32_t column(int i) { return (i * kThreads + threadIdx.x) * kVector; }

__device__ void store8(float* to, const float (&from)[8]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  *reinterpret_cast<float4*>(to + 4) = make_float4(from[4], from[5], from[6], from[7]);
}

template <int N>
__device__ float inverse_rms(const float (&x)[N][8], uint32_t hidden, float eps, float* partial) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += x[i][j] * x[i][j];
  return rsqrtf(block_sum(squares, partial) / static_cast<float>(hidden) + eps);
}

template <int N>
__device__ void store_fp8(const float (&x)[N][8], const Norm& args, size_t out, float* partial) {
  float largest = 0;
  if (args.quantize.row_scales != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, largest_magnitude(x[i]));
    largest = block_max(largest, partial);
  }
  const float factor = row_factor(args.quantize, blockIdx.x, largest);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column(i) < args.hidden)
      *reinterpret_cast<uint2*>(static_cast<uint8_t*>(args.out) + out + column(i)) = narrow_e4m3(x[i], factor);
}

// Each thread has up to N runs of eight elements; those past the end of the row are zero.
template <int N>
__global__ void __launch_bounds__(kThreads) norm_kernel(Norm args) {
  __shared__ float partial[32];
  allow_next();
  wait_for_last();
  const uint32_t row = args.rows ? args.rows[blockIdx.x] : blockIdx.x;
  float* residual = args.residual + size_t{row} * args.hidden;

  float x[N][8];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (column(i) < args.hidden)
      load8(residual + column(i), x[i]);
    else
#pragma unroll
      for (float& value : x[i]) value = 0;
  }
  if (args.delta) {
    float delta[N][8] = {};
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (column(i) < args.hidden)
        widen(*reinterpret_cast<const Bf16x8*>(args.delta + size_t{row} * args.hidden + column(i)), delta[i]);
    const float inverse = args.delta_weight ? inverse_rms(delta, args.hidden, args.eps, partial) : 1.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column(i) >= args.hidden) continue;
      float weight[8] = {};
      if (args.delta_weight) load8(args.delta_weight + column(i), weight);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[i][j] += args.delta_weight ? delta[i][j] * inverse * (1 + weight[j]) : delta[i][j];
      store8(residual + column(i), x[i]);
    }
  }
  if (!args.weight) return;
  const float inverse = inverse_rms(x, args.hidden, args.eps, partial);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (column(i) >= args.hidden) continue;
    float weight[8];
    load8(args.weight + column(i), weight);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] *= inverse * (1 + weight[j]);
  }
  const size_t out = size_t{blockIdx.x} * args.hidden;
  if (args.fp8) return store_fp8(x, args, out, partial);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column(i) < args.hidden)
      *reinterpret_cast<Bf16x8*>(static_cast<bf16_t*>(args.out) + out + column(i)) = narrow(x[i]);
}

}  // namespace

void norm(const NormArgs& args, const Stream& stream) {
  const Norm norm{args.residual,     static_cast<const bf16_t*>(args.delta),
                  args.delta_weight, args.rows,
                  args.weight,       args.out,
                  args.hidden,       args.eps,
                  args.quantize,     static_cast<bool>(args.quantize)};
  const uint32_t runs = (args.hidden + kThreads * kVector - 1) / (kThreads * kVector);
  switch (runs) {
    case 1: launch_early(stream, args.tokens, kThreads, 0, norm_kernel<1>, norm); break;
    case 2: launch_early(stream, args.tokens, kThreads, 0, norm_kernel<2>, norm); break;
    case 3: launch_early(stream, args.tokens, kThreads, 0, norm_kernel<3>, norm); break;
    case 4: launch_early(stream, args.tokens, kThreads, 0, norm_kernel<4>, norm); break;
    default: throw Error::invalid_argument("hidden_size " + std::to_string(args.hidden) + " is more than 8192");
  }
}

}  // namespace gemma_cuda::cuda
