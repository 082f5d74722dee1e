// RMS norm with what stands around it in a layer (NormArgs): the block's output is normed and added to the residual
// stream, and the stream normed for the next block, in one pass over memory.
//
// One block a row; a thread keeps its elements in registers between the two sums, so each byte moves once: 2 bytes of
// delta and 4 of residual read, 4 and 2 (1 as FP8) written an element. At the few rows of decode it is bound by
// latency. There delta comes as the parts that a product's blocks have of its sums (product_parts.h), and is added up
// here: the product need not wait for that.
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/product_parts.cuh"
#include "cuda/quantize.cuh"
#include "cuda/vector.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kMostThreads = 512;
constexpr uint32_t kVector = 8;

struct Norm {
  float* residual;
  const bf16_t* delta;
  ProductParts parts;  // of delta, where it is to be added
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
__device__ uint32_t column(int i) { return (i * blockDim.x + threadIdx.x) * kVector; }

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
__device__ void store_fp8(const float (&x)[N][8], const Norm& args, float given, size_t out, float* partial) {
  float largest = 0;
  if (args.quantize.row_scales != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, largest_magnitude(x[i]));
    largest = block_max(largest, partial);
  }
  const float factor = row_factor(args.quantize, given, blockIdx.x, largest);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column(i) < args.hidden)
      *reinterpret_cast<uint2*>(static_cast<uint8_t*>(args.out) + out + column(i)) = narrow_e4m3(x[i], factor);
}

// A thread's part of a norm's weights, which no kernel writes. At the few rows of decode they are asked for before the
// kernel before has ended: later they would wait behind all that the next product asks of memory. Of many rows more
// are computed at once without them in registers.
template <int N, bool Early>
class Weights {
 public:
  __device__ Weights(const float* weight, uint32_t hidden) : weight_(weight) {
    if constexpr (Early) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (weight != nullptr && column(i) < hidden) load8(weight + column(i), early_[i]);
    }
  }
  __device__ void get(int i, float (&to)[8]) const {
    if constexpr (Early) {
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j] = early_[i][j];
    } else {
      load8(weight_ + column(i), to);
    }
  }

 private:
  const float* weight_;
  float early_[Early ? N : 1][8] = {};
};

// The thread's part of delta: what is known of it before the kernel before has ended, then what it is.
template <int N, bool InParts>
struct Delta;

template <int N>
struct Delta<N, false> {
  __device__ explicit Delta(const Norm&) {}
  __device__ void load(const Norm& args, float (&to)[N][8]) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (column(i) < args.hidden) load8(args.delta + size_t{blockIdx.x} * args.hidden + column(i), to[i]);
  }
};

template <int N>
struct Delta<N, true> {
  Blocks blocks[N];
  PartScales scales[N];

  __device__ explicit Delta(const Norm& args) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      blocks[i] = Blocks(args.parts.cut, min(column(i), args.hidden - 1) / kPartRows);
      if (column(i) < args.hidden) scales[i] = PartScales(args.parts, column(i));
    }
  }
  __device__ void load(const Norm& args, float (&to)[N][8]) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (column(i) < args.hidden) add_parts(args.parts, blockIdx.x, column(i), blocks[i], scales[i], to[i]);
  }
};

// Each thread has up to N runs of eight elements; those past the end of the row are zero. One block a multiprocessor is
// enough, and has to be said: in the 64 registers that ptxas kept to, it brought one part behind the other.
template <int N, bool InParts>
__global__ void __launch_bounds__(kMostThreads, 1) norm_kernel(Norm args) {
  __shared__ float partial[32];
  allow_next();
  const Weights<N, InParts> weights(args.weight, args.hidden), delta_weights(args.delta_weight, args.hidden);
  const Delta<N, InParts> block_output(args);
  const float given = given_scale(args.quantize);
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
  if (InParts || args.delta) {
    float delta[N][8] = {};
    block_output.load(args, delta);
    const float inverse = args.delta_weight ? inverse_rms(delta, args.hidden, args.eps, partial) : 1.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column(i) >= args.hidden) continue;
      float weight[8] = {};
      if (args.delta_weight) delta_weights.get(i, weight);
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
    weights.get(i, weight);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] *= inverse * (1 + weight[j]);
  }
  const size_t out = size_t{blockIdx.x} * args.hidden;
  if (args.fp8) return store_fp8(x, args, given, out, partial);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column(i) < args.hidden)
      *reinterpret_cast<Bf16x8*>(static_cast<bf16_t*>(args.out) + out + column(i)) = narrow(x[i]);
}

template <bool InParts>
void launch(const NormArgs& args, const ProductParts& parts, const Stream& stream) {
  const Norm norm{.residual = args.residual,
                  .delta = static_cast<const bf16_t*>(args.delta),
                  .parts = parts,
                  .delta_weight = args.delta_weight,
                  .rows = args.rows,
                  .weight = args.weight,
                  .out = args.out,
                  .hidden = args.hidden,
                  .eps = args.eps,
                  .quantize = args.quantize,
                  .fp8 = static_cast<bool>(args.quantize)};
  const uint32_t vectors = (args.hidden + kVector - 1) / kVector, runs = (vectors + kMostThreads - 1) / kMostThreads;
  if (runs > 2) throw Error::invalid_argument("hidden_size " + std::to_string(args.hidden) + " is more than 8192");
  const uint32_t warps = (vectors + 32 * runs - 1) / (32 * runs);
  launch_early(stream, args.tokens, 32 * warps, 0, runs == 1 ? norm_kernel<1, InParts> : norm_kernel<2, InParts>, norm);
}

}  // namespace

void norm(const NormArgs& args, const Stream& stream) { launch<false>(args, {}, stream); }
void norm(const NormArgs& args, const ProductParts& delta, const Stream& stream) { launch<true>(args, delta, stream); }

}  // namespace gemma_cuda::cuda
