// The softmax of attention over scores that come tile by tile, in the fragments of a tensor core product (mma.cuh): a
// lane holds parts of rows lane / 4 and lane / 4 + 8 of the 16 rows of a warp.
#pragma once

#include <cmath>

#include "cuda/mma.cuh"

namespace gemma_cuda::cuda {

// Which keys the sixteen queries of a warp see; the first of them is at `position`.
struct Sight {
  uint32_t position;
  uint32_t window;  // 0: none

  __device__ bool none_of(uint32_t key, uint32_t keys) const {
    return key > position + 15 || (window != 0 && key + keys + window <= position + 1);
  }
  __device__ bool all_of(uint32_t key, uint32_t keys) const {
    return key + keys <= position + 1 && (window == 0 || key + window > position + 15);
  }
  __device__ bool sees(uint32_t row, uint32_t key) const {
    const uint32_t query = position + row;
    return key <= query && (window == 0 || key + window > query);
  }
};

// Products to scores, of keys from `key` on; those that are not seen become -infinity.
template <int N>
__device__ void score(float (&scores)[N][4], const ScoreScale& scale, const Sight& sight, uint32_t key, int lane) {
  const bool edge = !sight.all_of(key, N * 8);
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = scale(scores[n][i]);
      if (edge && !sight.sees(lane / 4 + i / 2 * 8, key + n * 8 + lane % 4 * 2 + i % 2)) scores[n][i] = -INFINITY;
    }
}

struct RunningSoftmax {
  float best[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // a lane's own share

  // Scores to exponentials. What was summed up with those before is to be multiplied by `shrink`.
  template <int N>
  __device__ void add(float (&scores)[N][4], float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      top = fmaxf(top, best[half]);
      const float base = top == -INFINITY ? 0 : top;  // a row may see nothing of the tile, nor of those before
      shrink[half] = fast_exp2(best[half] - base);
      best[half] = top;
      sum[half] *= shrink[half];
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) sum[half] += scores[n][i] = fast_exp2(scores[n][i] - base);
    }
  }

  // What a row's sum of exponentials times values is to be divided by.
  __device__ float mass(int half) const {
    float all = sum[half];
    all += __shfl_xor_sync(~0u, all, 1);
    all += __shfl_xor_sync(~0u, all, 2);
    return all;
  }
};

// The C fragments of columns 16 k to 16 k + 15 as the A fragment of the next product.
template <class Type, int N>
__device__ void narrow(Type, uint32_t (&a)[4], const float (&c)[N][4], int k) {
  a[0] = Type::pack(c[2 * k][0], c[2 * k][1]);
  a[1] = Type::pack(c[2 * k][2], c[2 * k][3]);
  a[2] = Type::pack(c[2 * k + 1][0], c[2 * k + 1][1]);
  a[3] = Type::pack(c[2 * k + 1][2], c[2 * k + 1][3]);
}

// Where a result goes, as bf16, or as E4M3 of what `factor` times it is.
struct AttentionOut {
  void* data;
  const float* scale;  // null: bf16

  __device__ float factor() const { return scale != nullptr ? 1.0f / *scale : 1.0f; }
  // Neighbours, from element `at` on.
  __device__ void store(size_t at, float2 x) const {
    if (scale != nullptr)
      *reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(data) + at) = static_cast<uint16_t>(narrow_e4m3(x.x, x.y));
    else
      *reinterpret_cast<uint32_t*>(static_cast<bf16_t*>(data) + at) = Bf16::pack(x.x, x.y);
  }
  __device__ void store(size_t at, float4 x) const {
    if (scale != nullptr)
      *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(data) + at) = narrow_e4m3(x.x, x.y) | narrow_e4m3(x.z, x.w)
                                                                                                   << 16;
    else
      *reinterpret_cast<uint2*>(static_cast<bf16_t*>(data) + at) =
          make_uint2(Bf16::pack(x.x, x.y), Bf16::pack(x.z, x.w));
  }
};

// Writes a warp's rows, each times `factor` over its mass, from element `at` of the result on; `rows` are there.
template <int N>
__device__ void store_rows(const float (&out)[N][4], const RunningSoftmax& softmax, float factor,
                           const AttentionOut& to, size_t at, size_t stride, uint32_t rows, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = factor / softmax.mass(half);
    const uint32_t row = lane / 4 + 8 * half;
    if (row >= rows) continue;
#pragma unroll
    for (int n = 0; n < N; ++n)
      to.store(at + row * stride + n * 8 + lane % 4 * 2,
               make_float2(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse));
  }
}

}  // namespace gemma_cuda::cuda
