// Elementwise operations: GeGLU, the soft cap on logits, conversion of weights. 16 bytes a thread and turn where the
// layout allows; bound by memory.
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/vector.cuh"
#include "ops/philox.h"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kThreads = 256;

unsigned blocks(size_t work) {
  return static_cast<unsigned>(std::clamp<size_t>((work + kThreads - 1) / kThreads, 1, 65535));
}

// The exponential keeps float32's precision where tanhf would cost twice as much: gelu(g) = g * sigmoid(2 u).
__device__ float gelu_tanh(float g) {
  const float u = 0.7978845608028654f * (g + 0.044715f * g * g * g);
  return g / (1.0f + __expf(-2.0f * u));
}

__global__ void geglu_kernel(const bf16_t* gate_up, bf16_t* out, uint32_t ffn, size_t runs) {
  allow_next();
  wait_for_last();
  const uint32_t per_row = ffn / 8;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < runs; i += size_t{gridDim.x} * blockDim.x) {
    const size_t row = i / per_row, column = i % per_row * 8;
    float gate[8], up[8];
    widen(*reinterpret_cast<const Bf16x8*>(gate_up + row * 2 * ffn + column), gate);
    widen(*reinterpret_cast<const Bf16x8*>(gate_up + row * 2 * ffn + ffn + column), up);
#pragma unroll
    for (int j = 0; j < 8; ++j) gate[j] = gelu_tanh(gate[j]) * up[j];
    *reinterpret_cast<Bf16x8*>(out + row * ffn + column) = narrow(gate);
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
  const size_t runs = size_t{args.tokens} * (args.ffn / 8);
  launch_early(stream, blocks(runs), kThreads, 0, geglu_kernel, static_cast<const bf16_t*>(args.gate_up),
               static_cast<bf16_t*>(args.out), args.ffn, runs);
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
