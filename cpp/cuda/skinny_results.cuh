// What becomes of the sums of a product of few rows (skinny_gemm.cu), a tile at a time, from the registers of its
// warpgroups: scales, GeGLU or a survey, and where they are written.
//
// Every layer reads this code anew, behind all that is asked of memory: there is little of it, and stores are under
// predicates, not in branches. Results are written by 1, 2 or 4 bytes, eight lanes beside each other: exchanged among
// lanes and written by 16 they took no less time.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/cache_policy.cuh"
#include "cuda/geglu.cuh"
#include "cuda/logit_survey.cuh"
#include "cuda/product_parts.cuh"

namespace gemma_cuda::cuda {

constexpr int kGroup = 128;          // threads of a warpgroup
constexpr int kGroups = 2;           // that multiply, where w is not packed
constexpr uint32_t kGroupRows = 64;  // of w, for each
constexpr uint32_t kTileRows = kGroups * kGroupRows;
static_assert(kTileRows == kPartRows);

// What becomes of the sums: they are written, by `whole` where no tile is cut, which takes two thirds of the code and
// three quarters of the registers; each block leaves its part of them (ProductParts); GeGLU is made of those of gate
// and up; or they are logits, of whose rows sample() needs a survey before anything else, and often nothing else.
enum class Kind { plain, whole, parts, gated, surveyed };

struct SkinnyGemm {
  void* out;
  DType out_dtype;
  const float* w_scales;  // FP8: of the rows of w
  const float* x_scales;  // FP8: of the tokens, or one for all
  bool one_x_scale;
  const float* out_scale;  // of out in FP8
  float soft_cap;          // of logits
  const SampleTask* tasks;
  uint32_t task_count;
  Survey* surveys;  // [tokens][blocks]
  bool fresh;       // the kernel before has written w
  uint32_t tokens, n;
  uint32_t tile_rows;  // at most kGroupRows a group, at least kGroupRows, a multiple of 8
  Cut cut;             // of the first tiles
  uint32_t whole;      // tiles a block computes whole, after those
  float4* partials;    // [block][its first tile, its last][Tokens / 8][threads that multiply]
  uint32_t* arrivals;  // [tile][group]
  const char* packed;  // w, where it is (packed_bf16.h)
  const uint32_t* packed_factors;
};

// Where the rows of a warpgroup begin in a tile. In one that is lower than two of them they overlap.
__device__ inline uint32_t group_row(const SkinnyGemm& args, uint32_t group) {
  return min(group * kGroupRows, args.tile_rows - kGroupRows);
}

// The two rows of w of which a thread has the sums of a tile: eight apart, or a row of gate and that of up for the same
// column of out. Eight lanes have consecutive ones. Past the end of w, or another's as well, they are n or more.
template <Kind kKind>
struct Rows {
  uint32_t row[2];

  __device__ Rows(const SkinnyGemm& args, uint32_t tile) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if constexpr (kKind == Kind::gated) {
      const uint32_t column = tile * (kTileRows / 2) + warp * 8 + lane / 4, ffn = args.n / 2;
      row[0] = column < ffn ? column : args.n;
      row[1] = row[0] + ffn;
    } else {
      const uint32_t group = warp / 4, first = group_row(args, group) + warp % 4 * 16 + lane / 4;
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i)
        row[i] = first + 8 * i < group * kGroupRows ? args.n : tile * args.tile_rows + first + 8 * i;
    }
  }
};

// Of a fragment's eight tokens a thread has two that follow each other: its i-th is this one.
__device__ inline uint32_t token_of(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// What the thread's sums of FP8 products are multiplied by: of its rows of w, and of x. The model's are asked for
// before they are needed: they come from memory, for a step reads more than the L2 cache holds before it needs them
// again.
struct Scales {
  float w[2], x;

  template <Kind kKind>
  __device__ Scales(const SkinnyGemm& args, const Rows<kKind>& rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      w[i] = args.w_scales != nullptr && rows.row[i] < args.n ? args.w_scales[rows.row[i]] : 1;
    x = args.w_scales != nullptr && args.one_x_scale ? *args.x_scales : 1;
  }
  template <int N>
  __device__ void apply(float (&sums)[N][4], const SkinnyGemm& args) const {
    if (args.w_scales == nullptr) return;
    if (args.one_x_scale) {
      multiply(sums, [&](int) { return x; });
    } else {
      float of_token[2 * N];
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) of_token[i] = args.x_scales[min(token_of(i), args.tokens - 1)];
      multiply(sums, [&](int i) { return of_token[i]; });
    }
  }

 private:
  template <int N, class F>
  __device__ void multiply(float (&sums)[N][4], F of_token) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][e] *= w[e / 2] * of_token(2 * i + e % 2);
  }
};

// Which of a thread's tokens there are, in the order of token_of().
template <int N>
__device__ uint32_t tokens_there(const SkinnyGemm& args, uint64_t kept = ~uint64_t{0}) {
  uint32_t there = 0;
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) there |= (token_of(i) < args.tokens && (kept >> token_of(i) & 1) != 0 ? 1u : 0u) << i;
  return there;
}

// A store under a predicate: ptxas makes a branch of an if around a conversion and a store. Logits are seldom read, and
// many; all else is what the next kernel reads (cache_policy.cuh).
__device__ inline void store_if(bool there, float* to, float x) {
  asm volatile("{.reg .pred there; setp.ne.b32 there, %0, 0; @there st.global.f32 [%1], %2;}" ::"r"(uint32_t{there}),
               "l"(to), "f"(x)
               : "memory");
}
__device__ inline void store_if(bool there, __nv_bfloat16* to, float x) {
  asm volatile("{.reg .pred there; setp.ne.b32 there, %0, 0; @there st.global.L2::cache_hint.b16 [%1], %2, %3;}" ::"r"(
                   uint32_t{there}),
               "l"(to), "h"(__bfloat16_as_ushort(__float2bfloat16_rn(x))), "l"(kEvictLast)
               : "memory");
}
__device__ inline void store_if(bool there, uint8_t* to, float x) {
  asm volatile("{.reg .pred there; setp.ne.b32 there, %0, 0; @there st.global.L2::cache_hint.b8 [%1], %2, %3;}" ::"r"(
                   uint32_t{there}),
               "l"(to), "r"(narrow_e4m3(x, 0)), "l"(kEvictLast)
               : "memory");
}

// A thread's results for one column of out, of the tokens in `there`; value(i) is that of token_of(i).
template <int N, class Out, class F>
__device__ void store_column(Out* out, uint32_t columns, uint32_t column, uint32_t there, F value) {
  Out* to = out + size_t{token_of(0)} * columns + column;
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) {
    store_if(there >> i & 1, to, value(i));
    to += size_t{columns} * (i % 2 == 0 ? 1 : 7);
  }
}

template <int N, Kind kKind>
__device__ void store(const float (&sums)[N][4], const SkinnyGemm& args, const Rows<kKind>& rows, uint32_t there) {
  const auto store_as = [&](auto* out) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_column<N>(out, args.n, rows.row[r], rows.row[r] < args.n ? there : 0,
                      [&](int i) { return sums[i / 2][2 * r + i % 2]; });
  };
  if (args.out_dtype == DType::f32)
    store_as(static_cast<float*>(args.out));
  else
    store_as(static_cast<__nv_bfloat16*>(args.out));
}

template <int N>
__device__ void store(const float (&sums)[N][4], const SkinnyGemm& args, const Rows<Kind::gated>& rows, float factor) {
  const uint32_t there = rows.row[0] < args.n ? tokens_there<N>(args) : 0;
  float results[2 * N];
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) results[i] = gated(sums[i / 2][i % 2], sums[i / 2][2 + i % 2]);
  if (args.out_dtype == DType::e4m3)
    store_column<N>(static_cast<uint8_t*>(args.out), args.n / 2, rows.row[0], there,
                    [&](int i) { return results[i] * factor; });
  else
    store_column<N>(static_cast<__nv_bfloat16*>(args.out), args.n / 2, rows.row[0], there,
                    [&](int i) { return results[i]; });
}

// Of each tile in its turn, by all threads that multiply, and at the end.
template <int Tokens, Kind kKind, int Groups>
class Finish {
 public:
  __device__ explicit Finish(const SkinnyGemm& args) : args_(args) {}
  __device__ void tile(const float (&sums)[Tokens / 8][4], const Rows<kKind>& rows) {
    store(sums, args_, rows, tokens_there<Tokens / 8>(args_));
  }
  __device__ void end() {}

 private:
  const SkinnyGemm& args_;
};

template <int Tokens, int Groups>
class Finish<Tokens, Kind::parts, Groups> {
 public:
  __device__ explicit Finish(const SkinnyGemm&) {}
  __device__ void end() {}
};

template <int Tokens, int Groups>
class Finish<Tokens, Kind::gated, Groups> {
 public:
  __device__ explicit Finish(const SkinnyGemm& args)
      : args_(args), factor_(args.out_scale != nullptr ? 1.0f / *args.out_scale : 1.0f) {}
  __device__ void tile(const float (&sums)[Tokens / 8][4], const Rows<Kind::gated>& rows) {
    store(sums, args_, rows, factor_);
  }
  __device__ void end() {}

 private:
  const SkinnyGemm& args_;
  const float factor_;
};

template <int Tokens, int Groups>
class Finish<Tokens, Kind::surveyed, Groups> {
  static constexpr int kWarps = Groups * kGroup / 32;

 public:
  __device__ explicit Finish(const SkinnyGemm& args)
      : args_(args), kept_(tokens_there<Tokens / 8>(args, kept_rows(args.tasks, args.task_count))) {
    for (uint32_t i = threadIdx.x % 32; i < Tokens; i += 32) surveys()[i] = {-INFINITY, ~0u, 0, 1};
    __syncwarp();
  }
  __device__ void tile(float (&sums)[Tokens / 8][4], const Rows<Kind::surveyed>& rows) {
    if (args_.soft_cap > 0)
#pragma unroll
      for (auto& fragment : sums)
#pragma unroll
        for (float& x : fragment) x = args_.soft_cap * tanhf(x / args_.soft_cap);
    add_to_surveys(surveys(), sums, rows.row, args_.n);
    if (__any_sync(~0u, kept_ != 0)) store(sums, args_, rows, kept_);  // in most steps nobody has any
  }
  __device__ void end() {
    asm volatile("bar.sync 15, %0;" ::"n"(Groups * kGroup) : "memory");
    const uint32_t token = threadIdx.x;
    if (token >= args_.tokens) return;
    const Survey* of_warps = surveys() - threadIdx.x / 32 * Tokens + token;
    Survey all = of_warps[0];
    for (int warp = 1; warp < kWarps; ++warp) all = join(all, of_warps[warp * Tokens]);
    args_.surveys[token * gridDim.x + blockIdx.x] = all;
  }

 private:
  // The warp's.
  __device__ static Survey* surveys() {
    __shared__ Survey of_warps[kWarps][Tokens];
    return of_warps[threadIdx.x / 32];
  }
  const SkinnyGemm& args_;
  const uint32_t kept_;  // as tokens_there()
};

// This block's part of a tile, for others to add (ProductParts).
template <int N>
__device__ void leave_part(const float (&sums)[N][4], const SkinnyGemm& args, uint32_t tile) {
  const uint32_t lane = threadIdx.x % 32, place = Blocks(args.cut, tile).place(blockIdx.x);
  float* to =
      reinterpret_cast<float*>(args.partials) + size_t{place} * 8 * N * kTileRows + threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t token = token_of(2 * i + e % 2);
      if (token < args.tokens) store_kept(to + token * kTileRows + e / 2 * 8, sums[i][e]);
    }
}

}  // namespace gemma_cuda::cuda
