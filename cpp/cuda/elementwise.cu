// Elementwise operations: GeGLU, quantization, the soft cap on logits, conversion of weights. 16 bytes a thread and
// turn where the layout allows; bound by memory.
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/geglu.cuh"
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/quantize.cuh"
#include "ops/philox.h"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kRowThreads = 512;  // where a block takes a row

unsigned blocks(size_t work) {
  return static_cast<unsigned>(std::clamp<size_t>((work + kThreads - 1) / kThreads, 1, 65535));
}

struct Geglu {
  const bf16_t* gate_up;
  void* out;  // bf16, or FP8 with `quantize`
  uint32_t ffn;
  Quantize quantize;
};

struct Pair {
  Bf16x8 gate, up;
};

__device__ Pair pair_at(const Geglu& args, size_t row, uint32_t column) {
  const bf16_t* gate = args.gate_up + row * 2 * args.ffn + column;
  return {*reinterpret_cast<const Bf16x8*>(gate), *reinterpret_cast<const Bf16x8*>(gate + args.ffn)};
}

__device__ void gate(const Pair& pair, float (&out)[8]) {
  float up[8];
  widen(pair.gate, out);
  widen(pair.up, up);
#pragma unroll
  for (int j = 0; j < 8; ++j) out[j] = gated(out[j], up[j]);
}

// A thread takes kAtOnce runs of eight elements, all asked for before the first is computed with.
template <bool Fp8>
__global__ void __launch_bounds__(kThreads) geglu_kernel(Geglu args, size_t runs) {
  constexpr int kAtOnce = 2;
  allow_next();
  wait_for_last();
  const uint32_t per_row = args.ffn / 8;
  const float factor = Fp8 ? 1.0f / *args.quantize.scale : 1.0f;
  const size_t threads = size_t{gridDim.x} * kThreads;
  for (size_t first = size_t{blockIdx.x} * kThreads + threadIdx.x; first < runs; first += kAtOnce * threads) {
    Pair pairs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (const size_t at = first + i * threads; at < runs) pairs[i] = pair_at(args, at / per_row, at % per_row * 8);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const size_t at = first + i * threads;
      if (at >= runs) break;
      float y[8];
      gate(pairs[i], y);
      if constexpr (Fp8)
        static_cast<uint2*>(args.out)[at] = narrow_e4m3(y, factor);
      else
        static_cast<Bf16x8*>(args.out)[at] = narrow(y);
    }
  }
}

// A block a row, for its largest magnitude; the second time the row comes from a cache.
__global__ void __launch_bounds__(kRowThreads) geglu_rows_kernel(Geglu args) {
  __shared__ float partial[32];
  allow_next();
  wait_for_last();
  const size_t row = blockIdx.x;
  float y[8], largest = 0;
  for (uint32_t column = threadIdx.x * 8; column < args.ffn; column += kRowThreads * 8) {
    gate(pair_at(args, row, column), y);
    largest = fmaxf(largest, largest_magnitude(y));
  }
  const float factor = row_factor(args.quantize, given_scale(args.quantize), blockIdx.x, block_max(largest, partial));
  uint8_t* out = static_cast<uint8_t*>(args.out) + row * args.ffn;
  for (uint32_t column = threadIdx.x * 8; column < args.ffn; column += kRowThreads * 8) {
    gate(pair_at(args, row, column), y);
    *reinterpret_cast<uint2*>(out + column) = narrow_e4m3(y, factor);
  }
}

struct QuantizeRows {
  const void* x;
  Quantize how;
  void* out;
  uint32_t width;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) quantize_kernel(QuantizeRows args) {
  __shared__ float partial[32];
  allow_next();
  wait_for_last();
  const T* x = static_cast<const T*>(args.x) + size_t{blockIdx.x} * args.width;
  float values[8], largest = 0;
  if (args.how.row_scales != nullptr) {
    for (uint32_t column = threadIdx.x * 8; column < args.width; column += kRowThreads * 8) {
      load8(x + column, values);
      largest = fmaxf(largest, largest_magnitude(values));
    }
    largest = block_max(largest, partial);
  }
  const float factor = row_factor(args.how, given_scale(args.how), blockIdx.x, largest);
  uint8_t* out = static_cast<uint8_t*>(args.out) + size_t{blockIdx.x} * args.width;
  for (uint32_t column = threadIdx.x * 8; column < args.width; column += kRowThreads * 8) {
    load8(x + column, values);
    *reinterpret_cast<uint2*>(out + column) = narrow_e4m3(values, factor);
  }
}

__global__ void fill_scales_kernel(float* to, const float* scale, uint32_t count) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = *scale;
}

template <class T>
__global__ void scale_product_kernel(T* out, Quantize x, const float* w_scales, uint32_t n, size_t count) {
  allow_next();
  wait_for_last();
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const float row = x.scale != nullptr ? *x.scale : x.row_scales[i / n];
    out[i] = static_cast<T>(static_cast<float>(out[i]) * row * w_scales[i % n]);
  }
}

__global__ void soft_cap_kernel(float* x, size_t count, float cap) {
  allow_next();
  wait_for_last();
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x)
    x[i] = cap * tanhf(x[i] / cap);
}

template <class To, class From>
__global__ void convert_kernel(To* to, const From* from, size_t count) {
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x)
    to[i] = static_cast<To>(static_cast<float>(from[i]));
}

template <class T>
__global__ void random_kernel(T* to, size_t count, uint64_t seed, float deviation) {
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x)
    to[i] = static_cast<T>(random_element(seed, i) * deviation);
}

template <class To>
void convert_to(To* to, const void* from, DType from_type, size_t count, cudaStream_t stream) {
  switch (from_type) {
    case DType::f32:
      convert_kernel<<<blocks(count), kThreads, 0, stream>>>(to, static_cast<const float*>(from), count);
      break;
    case DType::bf16:
      convert_kernel<<<blocks(count), kThreads, 0, stream>>>(to, static_cast<const bf16_t*>(from), count);
      break;
    case DType::f16:
      convert_kernel<<<blocks(count), kThreads, 0, stream>>>(to, static_cast<const __half*>(from), count);
      break;
    case DType::e4m3: throw Error::invalid_argument("FP8 is not converted without its scale");
  }
}

}  // namespace

void geglu(const GegluArgs& args, const Stream& stream) {
  const Geglu geglu{static_cast<const bf16_t*>(args.gate_up), args.out, args.ffn, args.quantize};
  if (args.quantize.row_scales != nullptr)
    return launch_early(stream, args.tokens, kRowThreads, 0, geglu_rows_kernel, geglu);
  const size_t runs = size_t{args.tokens} * (args.ffn / 8);
  launch_early(stream, blocks((runs + 1) / 2), kThreads, 0, args.quantize ? geglu_kernel<true> : geglu_kernel<false>,
               geglu, runs);
}

void quantize(const QuantizeArgs& args, const Stream& stream) {
  const QuantizeRows rows{args.x, args.how, args.out, args.width};
  launch_early(stream, args.rows, kRowThreads, 0,
               args.dtype == DType::f32 ? quantize_kernel<float> : quantize_kernel<bf16_t>, rows);
}

void fill_scales(float* to, const float* scale, uint32_t count, cudaStream_t stream) {
  fill_scales_kernel<<<blocks(count), kThreads, 0, stream>>>(to, scale, count);
  GEMMA_CUDA_CHECK(cudaGetLastError());
}

void scale_product(const GemmArgs& args, const Stream& stream) {
  const size_t count = size_t{args.tokens} * args.w.rows;
  if (args.out_dtype == DType::f32)
    launch_early(stream, blocks(count), kThreads, 0, scale_product_kernel<float>, static_cast<float*>(args.out),
                 args.x_scale, args.w.scales, args.w.rows, count);
  else
    launch_early(stream, blocks(count), kThreads, 0, scale_product_kernel<bf16_t>, static_cast<bf16_t*>(args.out),
                 args.x_scale, args.w.scales, args.w.rows, count);
}

void soft_cap(const SoftCapArgs& args, const Stream& stream) {
  const size_t count = size_t{args.rows} * args.cols;
  launch_early(stream, blocks(count), kThreads, 0, soft_cap_kernel, args.x, count, args.cap);
}

void fill_random(void* to, DType type, size_t count, uint64_t seed, float deviation, cudaStream_t stream) {
  if (type == DType::f32)
    random_kernel<<<blocks(count), kThreads, 0, stream>>>(static_cast<float*>(to), count, seed, deviation);
  else
    random_kernel<<<blocks(count), kThreads, 0, stream>>>(static_cast<bf16_t*>(to), count, seed, deviation);
  GEMMA_CUDA_CHECK(cudaGetLastError());
}

void convert(void* to, DType to_type, const void* from, DType from_type, size_t count, cudaStream_t stream) {
  if (to_type == DType::f32)
    convert_to(static_cast<float*>(to), from, from_type, count, stream);
  else
    convert_to(static_cast<bf16_t*>(to), from, from_type, count, stream);
  GEMMA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace gemma_cuda::cuda
