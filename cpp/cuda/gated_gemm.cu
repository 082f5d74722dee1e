// out [tokens, ffn] = gelu_tanh(x w_gate^T) * (x w_up^T) in bf16 or FP8 with f32 sums, for many tokens. The gated half
// of a feed-forward block: neither gate nor up is ever written, and GeGLU costs next to no time of its own.
//
// The product is that of large_gemm.cuh; of a tile's 256 rows of w, 128 are rows of gate and 128 those of up for the
// same columns of out. A thread has both of the same token and column, so what it needs for the result is in its
// registers.
//
// Reaches, on an H100 for gemma-7b's 3072 to 24576, 20 times back to back: 8192 tokens in bf16 3334 us, 742 TFLOP/s (by
// cuBLASLt's product, 3397, and a kernel for GeGLU 3845), in FP8 1758 us, 1407 TFLOP/s (2018); 256 tokens 121 us (157)
// and 67 (86), 128 tokens 110 (127) and 61 (70). At 384 and 1024 tokens it is about as fast as those two.
#include "cuda/gated_gemm.h"
#include "cuda/geglu.cuh"
#include "cuda/large_gemm.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kTileColumns = kHalfRows;               // of out
constexpr uint32_t kBlockBytes = kWarpTokens * kRowBytes;  // of a warp's results: 128 bytes of each of its rows

// Where a warp leaves its results for the copy to out.
template <class Out>
constexpr uint32_t kStagingBytes = kTileColumns / kElements<Out>* kBlockBytes;
template <class Out>
constexpr uint32_t kSharedBytes = kRingBytes + kConsumers * 4 * kStagingBytes<Out>;

struct GatedGemm : LargeGemm {
  const float* out_scale;  // of out in FP8
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What the thread's two rows are multiplied by, besides the scales of w.
template <class Type, class Out>
struct RowScales {
  float gate[2] = {1, 1}, up[2] = {1, 1};

  __device__ RowScales(const GatedGemm& args, uint32_t first) {
    if constexpr (std::is_same_v<Type, E4m3>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        gate[i] = up[i] = args.x_scale(first + threadIdx.x % 32 / 4 + 8 * i);
      }
      if constexpr (std::is_same_v<Out, E4m3>) {
        const float factor = 1.0f / *args.out_scale;
        up[0] *= factor, up[1] *= factor;
      }
    }
  }
};

// Without "memory": the compiler may move what it loads over them, scales, and nothing else of it lies there.
__device__ inline void store_shared(uint32_t to, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value));
}
__device__ inline void store_shared(uint32_t to, uint16_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(value));
}

// Columns 8 i and on of a warp's results, in the layout of a tensor copy: eight lanes with consecutive rows write to
// different chunks of 16 bytes.
__device__ inline void stage(Bf16, uint32_t staging, int i, const float (&y)[4]) {
  const uint32_t lane = threadIdx.x % 32, row = lane / 4,
                 to = staging + i / 8 * kBlockBytes + row * kRowBytes + ((i % 8 ^ row) << 4) + lane % 4 * 4;
  store_shared(to, Bf16::pack(y[0], y[1]));
  store_shared(to + 8 * kRowBytes, Bf16::pack(y[2], y[3]));
}
__device__ inline void stage(E4m3, uint32_t staging, int i, const float (&y)[4]) {
  const uint32_t lane = threadIdx.x % 32, row = lane / 4,
                 to = staging + row * kRowBytes + ((i / 2 ^ row) << 4) + i % 2 * 8 + lane % 4 * 2;
  store_shared(to, static_cast<uint16_t>(narrow_e4m3(y[0], y[1])));
  store_shared(to + 8 * kRowBytes, static_cast<uint16_t>(narrow_e4m3(y[2], y[3])));
}

// Of the tile's rows of w, those that belong to a thread's columns of a few fragments.
constexpr int kAtOnce = 4;
struct ColumnScales {
  float2 gate[kAtOnce], up[kAtOnce];

  __device__ void load(const float* scales, int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float* from = scales + 8 * (first + i) + threadIdx.x % 4 * 2;
      gate[i] = *reinterpret_cast<const float2*>(from);
      up[i] = *reinterpret_cast<const float2*>(from + kTileColumns);
    }
  }
};

// Sums of gate, then of up, to a warp's place of the staging area. A few fragments at a time, and the next ones' scales
// before these are stored, which loads are not moved over: the latencies are long and a warp has no other to hide them.
template <class Type, class Out, int N>
__device__ void finish(const float (&sums)[N][4], const RowScales<Type, Out>& rows, const float* scales,
                       uint32_t staging) {
  constexpr bool kScaled = std::is_same_v<Type, E4m3>;
  ColumnScales columns;
  if constexpr (kScaled) columns.load(scales, 0);
#pragma unroll
  for (int first = 0; first < N / 2; first += kAtOnce) {
    float y[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float gate = sums[first + i][e], up = sums[first + i + N / 2][e];
        if constexpr (kScaled) {
          gate *= (e % 2 == 0 ? columns.gate[i].x : columns.gate[i].y) * rows.gate[e / 2];
          up *= (e % 2 == 0 ? columns.up[i].x : columns.up[i].y) * rows.up[e / 2];
        }
        y[i][e] = gated(gate, up);
      }
    if (kScaled && first + kAtOnce < N / 2) columns.load(scales, first + kAtOnce);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) stage(Out{}, staging, first + i, y[i]);
  }
}

// The whole warp, of its staged results.
template <class Out>
__device__ void store(const CUtensorMap& out, uint32_t row, uint32_t column, uint32_t staging) {
  publish_to_products();  // and to other asynchronous readers
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
#pragma unroll
  for (uint32_t block = 0; block < kTileColumns / kElements<Out>; ++block)
    store_box(out, row, column + block * kElements<Out>, staging + block * kBlockBytes);
  commit_stores();
}

template <class Type, class Out, int Cluster>
__device__ void consume(const GatedGemm& args, const CUtensorMap& out, uint32_t ring, LargeShared& shared, int group) {
  const uint32_t warp = threadIdx.x / 32 % 4,
                 staging = ring + kSlots * kSlotBytes + (group * 4 + warp) * kStagingBytes<Out>;
  Products<Type, Cluster> products(args, ring, shared, group);
  float sums[kFragments][4];
  for (Tiles<Cluster> tiles(args); tiles.more(); tiles.next()) {
    const uint32_t row = tiles.token + group * kGroupTokens + warp * kWarpTokens;
    const RowScales<Type, Out> rows(args, row);
    products(sums);
    if (row >= args.tokens) continue;
    wait_stores_read();  // the last tile's; only one lane has any
    __syncwarp();
    finish(sums, rows, shared.scales, staging);
    store<Out>(out, row, tiles.row_tile * kTileColumns, staging);
  }
  wait_stores_read();  // shared memory is there as long as the block
}

#endif

template <class Type, class Out, int Cluster>
__global__ void __launch_bounds__(kThreads, 1)
    gated_gemm_kernel(const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap x,
                      const __grid_constant__ CUtensorMap out, const __grid_constant__ GatedGemm args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  __shared__ LargeShared shared;
  run_large_gemm<Cluster>(
      args, memory, shared, [&](uint32_t ring) { produce<Type, InOrder, Cluster>(args, w, x, ring, shared); },
      [&](uint32_t ring, int group) { consume<Type, Out, Cluster>(args, out, ring, shared, group); });
#endif
}

template <class Type, class Out, int Cluster>
void launch(const GatedGemmArgs& args, const DeviceInfo& device, const Stream& stream) {
  const uint32_t ffn = args.w.rows / 2;
  const GatedGemm work{large_gemm<Type, Cluster>(args, kTileColumns, ffn), args.quantize.scale};
  const auto kernel = gated_gemm_kernel<Type, Out, Cluster>;
  allow_shared(kernel, kSharedBytes<Out>);
  launch_clusters(
      work, Cluster, kSharedBytes<Out>, device, stream, kernel,
      tensor_map(args.w.data, args.w.dtype, args.w.rows, args.w.cols, kHalfRows),
      tensor_map(args.x, args.w.dtype, args.tokens, args.w.cols, kTileTokens),
      tensor_map(args.out, std::is_same_v<Out, E4m3> ? DType::e4m3 : DType::bf16, args.tokens, ffn, kWarpTokens), work);
}

template <class Type, class Out>
void launch(const GatedGemmArgs& args, const DeviceInfo& device, const Stream& stream) {
  by_clusters(args.tokens) ? launch<Type, Out, 2>(args, device, stream) : launch<Type, Out, 1>(args, device, stream);
}

bool compiled() {
  static const bool found = has_body(gated_gemm_kernel<Bf16, Bf16, 1>);
  return found;
}

}  // namespace

bool gated_gemm_fits(const GatedGemmArgs& args, const DeviceInfo& device) {
  return large_gemm_fits(args, device) && args.act == DType::bf16 && args.quantize.row_scales == nullptr &&
         (args.w.dtype == DType::e4m3 || !args.quantize) && args.w.rows % kTileRows == 0 && aligned(args.out) &&
         compiled();
}

void gated_gemm(const GatedGemmArgs& args, const DeviceInfo& device, const Stream& stream) {
  const auto run = args.w.dtype == DType::bf16 ? launch<Bf16, Bf16>
                   : args.quantize             ? launch<E4m3, E4m3>
                                               : launch<E4m3, Bf16>;
  run(args, device, stream);
}

}  // namespace gemma_cuda::cuda
