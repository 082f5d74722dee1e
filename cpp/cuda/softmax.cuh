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

// Those of keys from `key` on that are not seen become -infinity.
template <int N>
__device__ void hide(float (&scores)[N][4], const Sight& sight, uint32_t key, int lane) {
  const int last = static_cast<int>(sight.position + lane / 4 - key) - lane % 4 * 2;  // that the upper row sees
  const int first = sight.window == 0 ? -N * 8 - 16 : last - static_cast<int>(sight.window) + 1;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = n * 8 + i % 2 - i / 2 * 8;
      if (column > last || column < first) scores[n][i] = -INFINITY;
    }
}

// Products to what scores are a multiple of, the one that is returned; those of keys, from `key` on, that are not seen
// to -infinity. One branch for all: where each has its own, they take longer than the products.
template <int N>
__device__ float score(float (&products)[N][4], const ScoreScale& scale, const Sight& sight, uint32_t key, int lane) {
  float factor = scale.scale;
  if (scale.cap > 0) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) products[n][i] = scale.capped(products[n][i]);
    factor = 1;
  }
  if (!sight.all_of(key, N * 8)) hide(products, sight, key, lane);
  return factor;
}

// Exponentials are relative to a score of the row that is at most kSlack, in log2 units, below the highest so far:
// what was summed up is seldom to be scaled anew, and the final division makes good for it. Rows do not depend on each
// other.
struct RunningSoftmax {
  static constexpr float kSlack = 8;
  float base[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // a lane's own share

  // Products, `factor` of which are scores, to exponentials. What was summed up with those before is to be multiplied
  // by `shrink`; false: by ones.
  template <int N>
  __device__ bool add(float (&products)[N][4], float factor, float (&shrink)[2]) {
    bool rose = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float top = highest(products, half) * factor;
      const bool rises = top > base[half] + kSlack;
      shrink[half] = rises ? fast_exp2(base[half] - top) : 1;
      if (rises) base[half] = top;
      rose |= rises;
      sum[half] *= shrink[half];
    }
    // A row may see nothing of the tile, nor of those before.
    const float from[2] = {base[0] == -INFINITY ? 0 : -base[0], base[1] == -INFINITY ? 0 : -base[1]};
    float more[4] = {};
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) more[i] += products[n][i] = fast_exp2(fmaf(products[n][i], factor, from[i / 2]));
    sum[0] += more[0] + more[1];
    sum[1] += more[2] + more[3];
    return __any_sync(~0u, rose);
  }

  template <int N>
  __device__ static float highest(const float (&products)[N][4], int half) {
    float top[2] = {products[0][2 * half], products[0][2 * half + 1]};
#pragma unroll
    for (int n = 1; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) top[i] = fmaxf(top[i], products[n][2 * half + i]);
    float all = fmaxf(top[0], top[1]);
    all = fmaxf(all, __shfl_xor_sync(~0u, all, 1));
    return fmaxf(all, __shfl_xor_sync(~0u, all, 2));
  }

  // What a row's sum of exponentials times values is to be divided by.
  __device__ float mass(int half) const {
    float all = sum[half];
    all += __shfl_xor_sync(~0u, all, 1);
    all += __shfl_xor_sync(~0u, all, 2);
    return all;
  }
};

template <int N>
__device__ void shrink_sums(float (&out)[N][4], const float (&shrink)[2]) {
#pragma unroll
  for (auto& fragment : out)
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] *= shrink[i / 2];
}

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
