// The product of q, k and v by large_gemm.cuh, and in its registers what rope.cu does behind it: RMS norm of the heads
// of q and k where the model has one, rotation, q to its matrix, k and v, in FP8 where the cache is, to its pages.
//
// The 256 rows of w of a tile are a head of 256 or two of 128, so that a thread of the product has of its two tokens
// both elements of every pair that is rotated, and four lanes have a whole head, for the norm's sum. Sums are rounded
// to bf16 first: results are those of the product and rope.cu one after the other.
//
// The rows of w come to shared memory in runs of such an order (run_map) that a thread has eight elements of a head
// that follow each other. It stores them as they are, 16 bytes, four lanes a run of 64: no staging, no exchange between
// lanes, and rows of the cache may be anywhere.
//
// Reaches, on an H100 for gemma-7b's 3072 to 12288 (in brackets cuBLASLt and rope.cu), us: in bf16 106 at 1024 tokens
// (128), 232 at 2048 (254), 465 at 4096 (496), in one go 1004 at 8192 (979); in FP8 with a cache in FP8 25 at 256 (31),
// 66 at 1024 (81), 260 at 4096 (303), 517 at 8192 (595).
#include <algorithm>

#include "cuda/angle.cuh"
#include "cuda/large_gemm.cuh"
#include "cuda/rope.cuh"
#include "cuda/rope_gemm.h"

namespace gemma_cuda::cuda {
namespace {

struct RopeGemm : LargeGemm, Rope {};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Fragments, eight columns each, of a run of a head; a thread has eight columns of the run, from 8 * (lane % 4) on.
constexpr int kRun = kRunRows / 8;
__device__ inline uint32_t run_column(int run) { return run * kRunRows + threadIdx.x % 4 * 8; }

// A thread's sums in bf16: of each fragment two columns of a token, and of the token eight below.
using Rounded = uint32_t[kFragments][2];

constexpr uint32_t kNowhere = ~0u;

// The thread's two tokens.
template <class Type>
struct Tokens {
  uint32_t row[2];        // kNowhere past the last
  uint32_t cache_row[2];  // of the first K/V head, kNowhere where there is none; a cache has fewer than 2^32
  float position[2];
  float x_scale[2] = {1, 1};

  __device__ Tokens(const RopeGemm& args, uint32_t first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t token = first + threadIdx.x % 32 / 4 + 8 * i, at = min(token, args.tokens - 1);
      const uint32_t slot = args.slots[at];
      const bool there = token < args.tokens;
      row[i] = there ? token : kNowhere;
      cache_row[i] = there && slot != kNoSlot ? cuda::cache_row(args, slot) : kNowhere;
      position[i] = static_cast<float>(args.positions[at]);
      if constexpr (std::is_same_v<Type, E4m3>) x_scale[i] = args.x_scale(token);
    }
  }
};

// Keeps the compiler from knowing what they are.
__device__ inline void pin(Rounded& x) {
#pragma unroll
  for (auto& fragment : x)
#pragma unroll
    for (uint32_t& pair : fragment) asm volatile("" : "+r"(pair));
}

// The products as the unfused path has them.
template <class Type>
__device__ void round_sums(Rounded& to, const float (&sums)[kFragments][4], const Tokens<Type>& tokens,
                           const float* w_scales) {
#pragma unroll
  for (int first = 0; first < static_cast<int>(kFragments); first += kRun) {
    float scales[8];
    if constexpr (std::is_same_v<Type, E4m3>) load8(w_scales + run_column(first / kRun), scales);
#pragma unroll
    for (int i = 0; i < 2 * kRun; ++i) {
      const int row = i % 2;
      float low = sums[first + i / 2][2 * row], high = sums[first + i / 2][2 * row + 1];
      if constexpr (std::is_same_v<Type, E4m3>) {
        low *= scales[i / 2 * 2] * tokens.x_scale[row];
        high *= scales[i / 2 * 2 + 1] * tokens.x_scale[row];
      }
      to[first + i / 2][row] = Bf16::pack(low, high);
    }
  }
}

// The thread's columns of the run that begins at a fragment.
__device__ inline void widen_run(const Rounded& x, int fragment, int row, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    to[2 * i] = __uint_as_float(x[fragment + i][row] << 16);
    to[2 * i + 1] = __uint_as_float(x[fragment + i][row] & 0xFFFF0000);
  }
}

// Of the head whose fragments begin at First, for each of the two tokens.
template <int HeadDim, int First>
__device__ void inverse_rms(const Rounded& x, float eps, float (&inverse)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float squares = 0;
#pragma unroll
    for (int run = 0; run < HeadDim / 8; run += kRun) {
      float y[8];
      widen_run(x, First + run, row, y);
#pragma unroll
      for (float e : y) squares += e * e;
    }
    squares += __shfl_xor_sync(~0u, squares, 1);
    squares += __shfl_xor_sync(~0u, squares, 2);
    inverse[row] = rsqrtf(squares / HeadDim + eps);
  }
}

// Multiplies a run by what the norm has for it.
__device__ inline void norm(float (&x)[2][8], const float (&inverse)[2], const float* weight, int run) {
  float w[8];
  load8(weight + run_column(run), w);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i / 8][i % 8] *= inverse[i / 8] * (1 + w[i % 8]);
}

// Without branches, for what stands around them is to be computed meanwhile.
__device__ inline void store_where(bool where, char* to, const uint32_t (&x)[4]) {
  asm volatile(
      "{.reg .pred where; setp.ne.b32 where, %5, 0; @where st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(to),
      "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(int{where}));
}
__device__ inline void store_where(bool where, char* to, const uint32_t (&x)[2]) {
  asm volatile("{.reg .pred where; setp.ne.b32 where, %3, 0; @where st.global.v2.b32 [%0], {%1, %2};}" ::"l"(to),
               "r"(x[0]), "r"(x[1]), "r"(int{where}));
}

// A head of a tile, and where the thread's columns of its two rows begin.
struct Head : RopeHead {
  char* to[2];  // null: nowhere

  template <class Type>
  __device__ Head(const RopeGemm& args, const Tokens<Type>& tokens, uint32_t of_product) : RopeHead(args, of_product) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool nowhere = (query ? tokens.row[i] : tokens.cache_row[i]) == kNowhere;
      char* const begin = static_cast<char*>(RopeHead::to(args, tokens.row[i], tokens.cache_row[i]));
      to[i] = nowhere ? nullptr : begin + run_column(0) * (fp8(args) ? 1 : sizeof(bf16_t));
    }
  }

  // A run of one token.
  __device__ void store(Bf16, const float (&x)[8], int row, int run, float) const {
    const uint32_t pairs[] = {Bf16::pack(x[0], x[1]), Bf16::pack(x[2], x[3]), Bf16::pack(x[4], x[5]),
                              Bf16::pack(x[6], x[7])};
    store_where(to[row] != nullptr, to[row] + run * kRunRows * sizeof(bf16_t), pairs);
  }
  __device__ void store(E4m3, const float (&x)[8], int row, int run, float factor) const {
    const uint2 all = narrow_e4m3(x, factor);
    store_where(to[row] != nullptr, to[row] + run * kRunRows, {all.x, all.y});
  }
};

template <int HeadDim, int First, class Out>
__device__ void finish_value(Out out, const Rounded& x, const Head& head, float factor) {
#pragma unroll
  for (int run = 0; run < HeadDim / static_cast<int>(kRunRows); ++run)
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float y[8];
      widen_run(x, First + run * kRun, row, y);
      head.store(out, y, row, run, factor);
    }
}

template <int HeadDim, int First, class Out>
__device__ void finish_rotated(Out out, const RopeGemm& args, const Rounded& x, const Head& head,
                               const float (&position)[2], const float (&inverse)[2], float factor) {
  constexpr int kRuns = HeadDim / kRunRows, kHalf = kRuns / 2;
  const float* const weight = head.norm(args);
  float frequency[kHalf][8];
#pragma unroll
  for (int run = 0; run < kHalf; ++run) load8(args.inverse_frequency + run_column(run), frequency[run]);
#pragma unroll
  for (int run = 0; run < kHalf; ++run) {
    float low[2][8], high[2][8];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      widen_run(x, First + run * kRun, row, low[row]);
      widen_run(x, First + (kHalf + run) * kRun, row, high[row]);
    }
    if (weight != nullptr) {
      norm(low, inverse, weight, run);
      norm(high, inverse, weight, kHalf + run);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float sine, cosine;
        fast_sincos(position[row] * frequency[run][i], sine, cosine);
        rotate(low[row][i], high[row][i], sine, cosine);
      }
      head.store(out, low[row], row, run, factor);
      head.store(out, high[row], row, kHalf + run, factor);
    }
  }
}

template <int HeadDim, int First, class Type, class Out>
__device__ void finish_as(Out out, const RopeGemm& args, Rounded& x, const Tokens<Type>& tokens, const Head& head) {
  const float factor = std::is_same_v<Out, E4m3> ? head.factor(args) : 1;
  if (head.value) return finish_value<HeadDim, First>(out, x, head, factor);
  float inverse[2];
  if (head.norm(args) != nullptr) inverse_rms<HeadDim, First>(x, args.eps, inverse);
  pin(x);  // lest it stay widened, for which there is no room
  finish_rotated<HeadDim, First>(out, args, x, head, tokens.position, inverse, factor);
}

template <int HeadDim, int First, class Type>
__device__ void finish(const RopeGemm& args, Rounded& x, const Tokens<Type>& tokens, uint32_t index) {
  const Head head(args, tokens, index);
  head.fp8(args) ? finish_as<HeadDim, First>(E4m3{}, args, x, tokens, head)
                 : finish_as<HeadDim, First>(Bf16{}, args, x, tokens, head);
}

template <class Type, int HeadDim, int Cluster>
__device__ void consume(const RopeGemm& args, uint32_t ring, LargeShared& shared, int group) {
  constexpr uint32_t kHeads = kTileRows / HeadDim;
  Products<Type, Cluster> products(args, ring, shared, group);
  for (Tiles<Cluster> tiles(args); tiles.more(); tiles.next()) {
    const uint32_t first = tiles.token + group * kGroupTokens + threadIdx.x / 32 % 4 * kWarpTokens;
    const Tokens<Type> tokens(args, first);
    float sums[kFragments][4];  // of each tile its own: what was in them makes room
    products(sums);
    if (first >= args.tokens) continue;
    Rounded rounded;
    round_sums(rounded, sums, tokens, shared.scales);
    finish<HeadDim, 0>(args, rounded, tokens, tiles.row_tile * kHeads);
    if constexpr (kHeads == 2) finish<HeadDim, HeadDim / 8>(args, rounded, tokens, tiles.row_tile * kHeads + 1);
  }
}

#endif

template <class Type, int HeadDim, int Cluster>
__global__ void __launch_bounds__(kThreads, 1)
    rope_gemm_kernel(const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap x,
                     const __grid_constant__ RopeGemm args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  __shared__ LargeShared shared;
  run_large_gemm<Cluster>(
      args, memory, shared, [&](uint32_t ring) { produce<Type, InRuns, Cluster>(args, w, x, ring, shared); },
      [&](uint32_t ring, int group) { consume<Type, HeadDim, Cluster>(args, ring, shared, group); });
#endif
}

template <class Type, int HeadDim, int Cluster>
void launch(const GemmArgs& product, const RopeArgs& rope, const DeviceInfo& device, const Stream& stream) {
  const RopeGemm work{large_gemm<Type, Cluster>(product, kTileRows, kHalfRows), rope_of(rope)};
  const Matrix& w = product.w;
  const auto kernel = rope_gemm_kernel<Type, HeadDim, Cluster>;
  allow_shared(kernel, kRingBytes);
  launch_clusters(work, Cluster, kRingBytes, device, stream, kernel,
                  run_map(w.data, w.dtype, w.rows, w.cols, kHalfRows),
                  tensor_map(product.x, w.dtype, product.tokens, w.cols, kTileTokens), work);
}

template <class Type>
void launch(const GemmArgs& product, const RopeArgs& rope, const DeviceInfo& device, const Stream& stream) {
  const bool clusters = by_clusters(product.tokens);
  const auto run = rope.cache.head_dim == 256 ? (clusters ? launch<Type, 256, 2> : launch<Type, 256, 1>)
                                              : (clusters ? launch<Type, 128, 2> : launch<Type, 128, 1>);
  run(product, rope, device, stream);
}

bool compiled() {
  static const bool found = has_body(rope_gemm_kernel<Bf16, 256, 1>);
  return found;
}

// Whether the tiles are shared among the multiprocessors evenly enough: the last turn takes as long for a few of them.
// In FP8 even seven tenths of one turn are faster than two kernels, in bf16 two turns that are nine tenths full.
bool shares_evenly(const GemmArgs& product, const DeviceInfo& device) {
  const uint32_t all = device.multiprocessors, tiles = token_tiles(product.tokens) * (product.w.rows / kTileRows);
  if (product.w.dtype == DType::e4m3) return 10 * tiles >= 7 * all;
  const uint32_t turns = (tiles + all - 1) / all;
  return turns >= 2 && 10 * tiles >= 9 * turns * all;
}

// Of bf16 at most so many tokens at a time: more take longer, each.
constexpr uint32_t kMostTokens = 4096;

}  // namespace

bool rope_gemm_runs(const GemmArgs& product, const RopeArgs& rope, const DeviceInfo& device) {
  const KvLayer& cache = rope.cache;
  return large_gemm_fits(product, device) && product.out_dtype == DType::bf16 && product.tokens == rope.tokens &&
         (cache.head_dim == 128 || cache.head_dim == 256) &&
         product.w.rows == (rope.heads + 2 * cache.kv_heads) * cache.head_dim && product.w.rows % kTileRows == 0 &&
         (cache.dtype == DType::e4m3 || (cache.key_scales == nullptr && cache.value_scales == nullptr)) &&
         aligned(rope.inverse_frequency) && aligned(rope.q_norm) && aligned(rope.k_norm) && aligned(rope.q) &&
         aligned(cache.keys) && aligned(cache.values) && compiled();
}

bool rope_gemm_fits(const GemmArgs& product, const RopeArgs& rope, const DeviceInfo& device) {
  return shares_evenly(product, device) && rope_gemm_runs(product, rope, device);
}

void rope_gemm(const GemmArgs& product, const RopeArgs& rope, const DeviceInfo& device, const Stream& stream) {
  if (product.w.dtype == DType::e4m3) return launch<E4m3>(product, rope, device, stream);
  GemmArgs part = product;
  RopeArgs to = rope;
  for (uint32_t from = 0; from < product.tokens; from += kMostTokens) {
    part.tokens = to.tokens = std::min(product.tokens - from, kMostTokens);
    part.x = static_cast<const bf16_t*>(product.x) + size_t{from} * product.w.cols;
    to.positions = rope.positions + from;
    to.slots = rope.slots + from;
    to.q = static_cast<bf16_t*>(rope.q) + size_t{from} * rope.heads * rope.cache.head_dim;
    launch<Bf16>(part, to, device, stream);
  }
}

}  // namespace gemma_cuda::cuda
