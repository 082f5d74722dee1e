// Sixteen cached tokens of a head in shared memory, and their products with the queries and the probabilities of a
// group: S^T += K Q^T and O^T += V^T P^T. The tokens, and the columns of a value, are the sixteen rows of a product and
// the queries its eight columns, for a group has few. Which element of a fragment (mma.cuh) stands for which token or
// column of the head is free, as long as both sides of a product agree. In bf16 it is as ldmatrix has it; in FP8 such
// that a lane's elements are neighbours, 16 bytes where a row has so many, and come without a conflict of banks.
#pragma once

#include "cuda/mma.cuh"

namespace gemma_cuda::cuda {

constexpr int kTileTokens = 16;
constexpr int kTileQueries = 8;

__device__ inline float2 operator*(float2 x, float factor) { return make_float2(x.x * factor, x.y * factor); }
__device__ inline float4 operator*(float4 x, float factor) {
  return make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
}

// Cache: bf16_t, or uint8_t for E4M3.
template <int HeadDim, class Cache>
struct CacheTile;

template <int HeadDim>
struct CacheTile<HeadDim, bf16_t> {
  using Type = Bf16;
  using Rows = Tile<HeadDim>;

  // Where in a head the two elements of a query's k-th B fragment are: the first pair, and the second.
  __device__ static int query_column(int k, int pair, int lane) { return k * 16 + pair * 8 + lane % 4 * 2; }
  // Which token the scores 0 and 1, or 2 and 3, are of.
  __device__ static int token(int half, int lane) { return half * 8 + lane / 4; }

  __device__ static void multiply_keys(float (&scores)[4], const uint32_t (&q)[HeadDim / 16][2], uint32_t keys,
                                       int lane) {
    float odd[4] = {};  // two sums, for neither product need wait for the other
#pragma unroll
    for (int k = 0; k < HeadDim / 16; ++k) {
      uint32_t a[4];
      Rows::columns(a, keys, 0, k * 16, lane);
      mma(Type{}, k % 2 == 0 ? scores : odd, {a[0], a[2], a[1], a[3]}, q[k][0], q[k][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] += odd[i];
  }
  __device__ static void multiply_values(float (&out)[HeadDim / 16][4], const uint32_t (&p)[2], uint32_t values,
                                         int lane) {
#pragma unroll
    for (int m = 0; m < HeadDim / 16; ++m) {
      uint32_t a[4];
      Rows::rows(a, values, 0, m * 16, lane);
      mma(Type{}, out[m], {a[0], a[2], a[1], a[3]}, p[0], p[1]);
    }
  }
  // Calls f(query, column of the head, neighbours from there on) with what the lane has; its queries are 2 (lane % 4)
  // and the next. Lanes of neighbouring columns exchange, so that each has two columns of one query.
  template <class F>
  __device__ static void each_run(const float (&out)[HeadDim / 16][4], int lane, F f) {
    const int odd = lane / 4 % 2;
#pragma unroll
    for (int i = 0; i < HeadDim / 8; ++i) {
      const float first = out[i / 2][i % 2 * 2], second = out[i / 2][i % 2 * 2 + 1];
      const float other = __shfl_xor_sync(~0u, odd ? first : second, 4);
      f(lane % 4 * 2 + odd, i * 8 + lane / 8 * 2, odd ? make_float2(other, second) : make_float2(first, other));
    }
  }
};

template <int HeadDim>
struct CacheTile<HeadDim, uint8_t> {
  using Type = F16;
  using Rows = SwizzledRows<HeadDim>;
  // Of a key's row four lanes have a run each, of a value's row eight; several times where the row is longer.
  static constexpr int kKeyRun = HeadDim / 4 < 16 ? HeadDim / 4 : 16, kValueRun = HeadDim / 8 < 16 ? HeadDim / 8 : 16;

  __device__ static int query_column(int k, int pair, int lane) {
    constexpr int kSteps = kKeyRun / 4;  // of a run
    return k / kSteps * 4 * kKeyRun + lane % 4 * kKeyRun + k % kSteps * 4 + pair * 2;
  }
  // Odd rows of a fragment are exchanged so that those of a quarter of a warp lie in different banks.
  __device__ static int row_of(int row) { return row ^ (row & 1) << 2; }
  __device__ static int token(int half, int lane) { return half * 8 + row_of(lane / 4); }

  template <int Run>
  __device__ static Words<Run> load(uint32_t base, int row, int column) {
    return Words<Run>(Rows::chunk(base, row, column / 16) + column % 16);
  }

  __device__ static void multiply_keys(float (&scores)[4], const uint32_t (&q)[HeadDim / 16][2], uint32_t keys,
                                       int lane) {
    float odd[4] = {};
    const int row = row_of(lane / 4);
#pragma unroll
    for (int span = 0; span < HeadDim / (4 * kKeyRun); ++span) {
      const int column = span * 4 * kKeyRun + lane % 4 * kKeyRun;
      const auto low = load<kKeyRun>(keys, row, column), high = load<kKeyRun>(keys, row + 8, column);
#pragma unroll
      for (int i = 0; i < kKeyRun / 4; ++i) {
        const auto& b = q[span * (kKeyRun / 4) + i];
        mma(Type{}, i % 2 == 0 ? scores : odd,
            {F16::of_e4m3(low.word[i]), F16::of_e4m3(high.word[i]), F16::of_e4m3(low.word[i] >> 16),
             F16::of_e4m3(high.word[i] >> 16)},
            b[0], b[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] += odd[i];
  }

  __device__ static void multiply_values(float (&out)[HeadDim / 16][4], const uint32_t (&p)[2], uint32_t values,
                                         int lane) {
    const int first = row_of(lane % 4 * 2), second = row_of(lane % 4 * 2 + 1);
#pragma unroll
    for (int span = 0; span < HeadDim / (8 * kValueRun); ++span) {
      const int column = span * 8 * kValueRun + lane / 4 * kValueRun;
      const auto a = load<kValueRun>(values, first, column), b = load<kValueRun>(values, second, column);
      const auto c = load<kValueRun>(values, first + 8, column), d = load<kValueRun>(values, second + 8, column);
#pragma unroll
      for (int i = 0; i < kValueRun; i += 2) {
        // Pairs of tokens, of one column each.
        const uint32_t which = i % 4 == 0 ? 0x5140 : 0x7362;
        const uint32_t low = __byte_perm(a.word[i / 4], b.word[i / 4], which);
        const uint32_t high = __byte_perm(c.word[i / 4], d.word[i / 4], which);
        mma(Type{}, out[(span * kValueRun + i) / 2],
            {F16::of_e4m3(low), F16::of_e4m3(low >> 16), F16::of_e4m3(high), F16::of_e4m3(high >> 16)}, p[0], p[1]);
      }
    }
  }

  template <class F>
  __device__ static void each_run(const float (&out)[HeadDim / 16][4], int lane, F f) {
#pragma unroll
    for (int span = 0; span < HeadDim / (8 * kValueRun); ++span)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = lane % 4 * 2 + i, column = span * 8 * kValueRun + lane / 4 * kValueRun;
        const auto at = [&](int j) { return out[(span * kValueRun + j) / 2][j % 2 * 2 + i]; };
        if constexpr (kValueRun == 2)
          f(query, column, make_float2(at(0), at(1)));
        else
#pragma unroll
          for (int j = 0; j < kValueRun; j += 4)
            f(query, column + j, make_float4(at(j), at(j + 1), at(j + 2), at(j + 3)));
      }
  }
};

}  // namespace gemma_cuda::cuda
