// residual[t] = table[ids[t]] * scale, where an id may stand for a token the device has yet to sample: one block a
// token, 16 bytes of the table a thread and turn. Bound by memory and, at some microseconds, by the launch.
#include "cuda/check.h"
#include "cuda/ops.h"
#include "cuda/vector.cuh"

namespace gemma_cuda::cuda {
namespace {

__global__ void embed_kernel(const uint32_t* ids, const uint32_t* last_tokens, const bf16_t* table, uint32_t hidden,
                             float scale, float* residual) {
  const uint32_t given = ids[blockIdx.x], id = given < kPendingToken ? given : last_tokens[given - kPendingToken];
  const bf16_t* row = table + size_t{id} * hidden;
  float* out = residual + size_t{blockIdx.x} * hidden;
  for (uint32_t i = threadIdx.x * 8; i < hidden; i += blockDim.x * 8) {
    float x[8];
    widen(*reinterpret_cast<const Bf16x8*>(row + i), x);
#pragma unroll
    for (float& value : x) value *= scale;
    *reinterpret_cast<float4*>(out + i) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(out + i + 4) = make_float4(x[4], x[5], x[6], x[7]);
  }
}

}  // namespace

void embed(const EmbedArgs& args, cudaStream_t stream) {
  embed_kernel<<<args.tokens, 256, 0, stream>>>(args.ids, args.last_tokens, static_cast<const bf16_t*>(args.table.data),
                                                args.table.cols, args.scale, args.residual);
  GEMMA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace gemma_cuda::cuda
