// out [tokens, ffn] = gelu_tanh(x w_gate^T) * (x w_up^T) in bf16 or FP8 with f32 sums, for many tokens. The gated half
// of a feed-forward block: neither gate nor up is ever written, and GeGLU costs next to no time of its own.
//
// A block's tile is 128 tokens by 128 columns of out, which are 128 rows of gate and 128 of up. Of three warpgroups one
// is the producer: a thread of it keeps a ring of four slots full by tensor copies, each 128 bytes of a row of x and w.
// The two consumers have 64 tokens each and multiply them with all 256 rows of w at once: a thread then has gate and up
// of the same token and column, and what it needs for the result is in its registers. The blocks stay and take tile
// after tile; the producer is at the next one while the last is being finished.
//
// Two blocks, a cluster, take two tiles of tokens and the same columns. Each brings one half of the weights, gate or
// up, to both (multicast): so a block asks the L2 cache for 32 KiB a slot and not 48, which it could not deliver. A
// slot is filled again only when the consumers of both blocks are through with it.
//
// Tiles go through `group` bands of tokens first, then through the columns: at any time the blocks work on as many rows
// of w as of x, and a group of bands, 12 MB of gemma-7b, stays in the L2 cache while the weights pass by.
//
// Reaches, on an H100 for gemma-7b's 3072 to 24576, 20 times back to back: 8192 tokens in bf16 3412 us, 725 TFLOP/s (by
// cuBLASLt's product, 3397, and a kernel for GeGLU 3845), in FP8 1934 us, 1279 TFLOP/s (2018); 256 tokens 132 us (157)
// and 73 (86), 128 tokens 112 (127) and 59 (70). At 384 and 1024 tokens it is about as fast as those two. Letting one
// consumer run some slots behind the other, for products while the first computes GeGLU, made it 1 to 3 % slower.
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/barrier.cuh"
#include "cuda/check.h"
#include "cuda/gated_gemm.h"
#include "cuda/launch.cuh"
#include "cuda/skinny_gemm.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr int kGroup = 128;    // threads of a warpgroup
constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kThreads = (1 + kConsumers) * kGroup;
constexpr uint32_t kGroupTokens = 64;  // of a consumer
constexpr uint32_t kWarpTokens = 16;
constexpr uint32_t kTileTokens = kConsumers * kGroupTokens;
constexpr uint32_t kTileColumns = 128;  // of out; as many rows of gate and of up
constexpr uint32_t kSlots = 4;
constexpr uint32_t kRowBytes = 128;  // of a slot
constexpr uint32_t kXBytes = kTileTokens * kRowBytes, kHalfBytes = kTileColumns * kRowBytes;
constexpr uint32_t kSlotBytes = kXBytes + 2 * kHalfBytes;
constexpr uint32_t kBlockBytes = kWarpTokens * kRowBytes;  // of a warp's results: 128 bytes of each of its rows

template <class Type>
constexpr uint32_t kElements = std::is_same_v<Type, E4m3> ? 128 : 64;  // in 128 bytes

// Where a warp leaves its results for the copy to out.
template <class Out>
constexpr uint32_t kStagingBytes = kTileColumns / kElements<Out>* kBlockBytes;
template <class Out>
constexpr uint32_t kSharedBytes =
    kSlots* kSlotBytes + kConsumers * 4 * kStagingBytes<Out> + 1024;  // to begin at a multiple of it

struct GatedGemm {
  uint32_t tokens, ffn;
  uint32_t depth;         // slots of a tile
  uint32_t bands;         // of the tokens of a cluster
  uint32_t group;         // bands
  bool fresh;             // the kernel before has written w
  const float* w_scales;  // FP8: of the rows of w
  const float* x_scales;  // FP8: of the tokens, or one for all
  bool one_x_scale;
  const float* out_scale;  // of out in FP8
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr uint32_t kScaleBytes = 2 * kTileColumns * sizeof(float);

// Registers of a thread, of as many as the block was launched with: 168 each.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = (168 * (1 + kConsumers) - kProducerRegisters) / kConsumers;

struct Shared {
  Barrier full[kSlots], empty[kSlots];
  alignas(16) float scales[2 * kTileColumns];  // of the tile's rows of gate and up
};

template <int Cluster>
__device__ inline uint32_t rank() {
  return Cluster == 1 ? 0 : blockIdx.x % Cluster;
}

// The tiles of a block, each by its first token and column.
template <int Cluster>
class Tiles {
 public:
  __device__ explicit Tiles(const GatedGemm& args) : args_(args), at_(blockIdx.x / Cluster) { find(); }
  __device__ bool more() const { return at_ < args_.bands * (args_.ffn / kTileColumns); }
  __device__ void next() {
    at_ += gridDim.x / Cluster;
    find();
  }
  uint32_t token, column;

 private:
  __device__ void find() {
    const uint32_t columns = args_.ffn / kTileColumns, first = at_ / (args_.group * columns) * args_.group,
                   in_group = at_ - first * columns, bands = min(args_.group, max(args_.bands, first + 1) - first);
    token = ((first + in_group % bands) * Cluster + rank<Cluster>()) * kTileTokens;
    column = in_group / bands * kTileColumns;
  }
  const GatedGemm& args_;
  uint32_t at_;
};

// A place of the ring and how often it went around.
struct Turn {
  uint32_t slot = 0, parity = 0;

  __device__ void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
  __device__ uint32_t before() const { return (slot + kSlots - 1) % kSlots; }
};

// All threads of the cluster. Also makes what was written before it known to them.
template <int Cluster>
__device__ inline void meet() {
  if constexpr (Cluster == 1) {
    __syncthreads();
  } else {
    __syncwarp();  // one thread may come from where the others have not been
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
  }
}

// Starts the copy of a box whose first element is at (row, column); the barrier counts its bytes.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, uint32_t row, uint32_t column, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}
// To the same place of both blocks of the cluster, whose barriers count it each.
__device__ inline void copy_box_to_both(uint32_t to, const CUtensorMap& map, uint32_t row, uint32_t column,
                                        Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "h"(uint16_t{3})
      : "memory");
}
__device__ inline void copy_row(const void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}
__device__ inline void store_box(const CUtensorMap& map, uint32_t row, uint32_t column, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until what this thread stored has been read from shared memory.
__device__ inline void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

template <class Type, int Cluster>
__device__ void produce(const GatedGemm& args, const CUtensorMap& w, const CUtensorMap& x, uint32_t ring,
                        Shared& shared) {
  Tiles<Cluster> tiles(args);
  auto bring_half = [&](uint32_t half, uint32_t slot, uint32_t step, auto copy) {
    copy(ring + slot * kSlotBytes + kXBytes + half * kHalfBytes, w, half * args.ffn + tiles.column,
         step * kElements<Type>, shared.full[slot]);
  };
  // With the last slot come the scales: it is asked for when all consumers are in this tile, through with the scales of
  // the one before.
  auto bring_weights = [&](uint32_t slot, uint32_t step) {
    const bool scales = std::is_same_v<Type, E4m3> && step == args.depth - 1;
    Barrier& full = shared.full[slot];
    arrive_expecting(full, kSlotBytes + (scales ? kScaleBytes : 0));
    if constexpr (Cluster == 1) {
      bring_half(0, slot, step, copy_box);
      bring_half(1, slot, step, copy_box);
    } else {
      bring_half(rank<Cluster>(), slot, step, copy_box_to_both);
    }
    if (!scales) return;
    copy_row(shared.scales, args.w_scales + tiles.column, kScaleBytes / 2, full);
    copy_row(shared.scales + kTileColumns, args.w_scales + args.ffn + tiles.column, kScaleBytes / 2, full);
  };
  auto bring_x = [&](uint32_t slot, uint32_t step) {
    copy_box(ring + slot * kSlotBytes, x, tiles.token, step * kElements<Type>, shared.full[slot]);
  };
  // A tile is deeper than the ring. Weights depend on no kernel, so they come before the one before has ended.
  for (uint32_t step = 0; step < kSlots; ++step) bring_weights(step, step);
  wait_for_last();
  for (uint32_t step = 0; step < kSlots; ++step) bring_x(step, step);
  Turn turn;
  for (uint32_t step = kSlots; tiles.more(); step = 0, tiles.next())
    for (; step < args.depth; ++step, turn.next()) {
      wait(shared.empty[turn.slot], turn.parity);
      bring_weights(turn.slot, step);
      bring_x(turn.slot, step);
    }
}

// How a consumer tells the producers that its warps have read a slot: each block's, since both have filled it. Nothing
// was written that they are to see, so the arrival orders nothing: to do so in a cluster it would wait for memory.
template <int Cluster>
class Release {
 public:
  __device__ explicit Release(Shared& shared) : empty_(shared_address(shared.empty)), lane_(threadIdx.x % 32) {
    if constexpr (Cluster > 1)
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(empty_) : "r"(empty_), "r"(lane_ % Cluster));
  }
  __device__ void operator()(uint32_t slot) const {
    if (lane_ >= Cluster) return;
    asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                     empty_ + slot * static_cast<uint32_t>(sizeof(Barrier)))
                 : "memory");
  }

 private:
  uint32_t empty_, lane_;
};

// What the thread's two rows are multiplied by, besides the scales of w.
template <class Type, class Out>
struct RowScales {
  float gate[2] = {1, 1}, up[2] = {1, 1};

  __device__ RowScales(const GatedGemm& args, uint32_t first) {
    if constexpr (std::is_same_v<Type, E4m3>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t row = min(first + threadIdx.x % 32 / 4 + 8 * i, args.tokens - 1);
        gate[i] = up[i] = args.x_scales[args.one_x_scale ? 0 : row];
      }
      if constexpr (std::is_same_v<Out, E4m3>) {
        const float factor = 1.0f / *args.out_scale;
        up[0] *= factor, up[1] *= factor;
      }
    }
  }
};

// gelu_tanh(gate) * up. As in elementwise.cu, gelu(g) = g * sigmoid(2 u), but with the constants drawn together, and
// without what keeps denormals, or divisors over 2^126, right: they end as zeros.
__device__ inline float gated(float gate, float up) {
  constexpr float kFactor = -2 * 0.7978845608028654f * 1.4426950408889634f;
  const float power = fast_exp2(gate * fmaf(gate * gate, 0.044715f * kFactor, kFactor));
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + power));
  return gate * up * inverse;
}

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
__device__ void consume(const GatedGemm& args, const CUtensorMap& out, uint32_t ring, Shared& shared, int group) {
  const uint32_t warp = threadIdx.x / 32 % 4,
                 staging = ring + kSlots * kSlotBytes + (group * 4 + warp) * kStagingBytes<Out>;
  const Release<Cluster> free(shared);
  float sums[2 * kTileColumns / 8][4];
  auto start_slot = [&](uint32_t slot, bool keep) {
    const uint32_t x = ring + slot * kSlotBytes + group * kGroupTokens * kRowBytes,
                   w = ring + slot * kSlotBytes + kXBytes;
    begin_products();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      multiply_columns(Type{}, sums, operand(x + 32 * k, 0), operand(w + 32 * k, 0), keep || k > 0);
    commit_products();
  };
  Turn turn;
  for (Tiles<Cluster> tiles(args); tiles.more(); tiles.next()) {
    const uint32_t row = tiles.token + group * kGroupTokens + warp * kWarpTokens;
    const RowScales<Type, Out> rows(args, row);
    for (uint32_t step = 0; step < args.depth; ++step, turn.next()) {
      wait(shared.full[turn.slot], turn.parity);
      start_slot(turn.slot, step > 0);
      wait_products<1>();  // those of the slot before
      if (step > 0) free(turn.before());
    }
    wait_products<0>();
    pin(sums);
    free(turn.before());
    if (row >= args.tokens) continue;
    wait_stores_read();  // the last tile's; only one lane has any
    __syncwarp();
    finish(sums, rows, shared.scales, staging);
    store<Out>(out, row, tiles.column, staging);
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
  __shared__ Shared shared;
  allow_next();
  uint32_t ring = (shared_address(memory) + 1023) / 1024 * 1024;
  asm volatile("" : "+r"(ring));  // lest it be computed again for every slot
  if (threadIdx.x == 0) {
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      init(shared.full[slot], 1);
      init(shared.empty[slot], Cluster * kConsumers * kGroup / 32);
    }
    publish_barriers();
  }
  meet<Cluster>();  // before the other block's copies come
  if (args.fresh) wait_for_last();
  if (threadIdx.x < kGroup) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<Type, Cluster>(args, w, x, ring, shared);
  } else {
    grow_registers<kConsumerRegisters>();
    wait_for_last();  // it may still read out, or write the scales of x
    consume<Type, Out, Cluster>(args, out, ring, shared, threadIdx.x / kGroup - 1);
  }
  if constexpr (Cluster > 1) meet<Cluster>();  // the other block arrives at barriers of this one to its end
#endif
}

bool compiled() {
  static const bool found = [] {
    cudaFuncAttributes attributes;
    GEMMA_CUDA_CHECK(cudaFuncGetAttributes(&attributes, gated_gemm_kernel<Bf16, Bf16, 1>));
    return attributes.sharedSizeBytes > 0;  // else it has no body
  }();
  return found;
}

uint32_t depth(const GatedGemmArgs& args) {
  return static_cast<uint32_t>((args.w.cols * size_of(args.w.dtype) + kRowBytes - 1) / kRowBytes);
}

uint32_t token_tiles(const GatedGemmArgs& args) { return (args.tokens + kTileTokens - 1) / kTileTokens; }

// As launch_early(), of clusters.
template <class... Parameters, class... Arguments>
void launch_clusters(const Stream& stream, unsigned clusters, unsigned size, size_t shared,
                     void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {size, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = clusters * size;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared;
  config.stream = stream.stream;
  config.attrs = attributes;
  config.numAttrs = stream.overlaps ? 2 : 1;
  GEMMA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class Type, class Out, int Cluster>
void launch(const GatedGemmArgs& args, const DeviceInfo& device, const Stream& stream) {
  GatedGemm work{};
  work.tokens = args.tokens;
  work.ffn = args.w.rows / 2;
  work.depth = depth(args);
  work.bands = (token_tiles(args) + Cluster - 1) / Cluster;
  work.group = std::is_same_v<Type, E4m3> ? 16 : 8;
  work.fresh = args.w.fresh;
  work.w_scales = args.w.scales;
  work.x_scales = args.x_scale.scale != nullptr ? args.x_scale.scale : args.x_scale.row_scales;
  work.one_x_scale = args.x_scale.scale != nullptr;
  work.out_scale = args.quantize.scale;
  const auto kernel = gated_gemm_kernel<Type, Out, Cluster>;
  allow_shared(kernel, kSharedBytes<Out>);
  const uint32_t clusters =
      std::min<uint32_t>(device.multiprocessors / Cluster, work.bands * (work.ffn / kTileColumns));
  launch_clusters(
      stream, clusters, Cluster, kSharedBytes<Out>, kernel,
      tensor_map(args.w.data, args.w.dtype, args.w.rows, args.w.cols, kTileColumns),
      tensor_map(args.x, args.w.dtype, args.tokens, args.w.cols, kTileTokens),
      tensor_map(args.out, std::is_same_v<Out, E4m3> ? DType::e4m3 : DType::bf16, args.tokens, work.ffn, kWarpTokens),
      work);
}

// Many tokens gain by sharing weights; few leave a cluster less even shares of the multiprocessors.
bool by_clusters(const GatedGemmArgs& args) {
  const uint32_t tiles = token_tiles(args);
  return tiles == 2 || tiles > 8;
}

template <class Type, class Out>
void launch(const GatedGemmArgs& args, const DeviceInfo& device, const Stream& stream) {
  by_clusters(args) ? launch<Type, Out, 2>(args, device, stream) : launch<Type, Out, 1>(args, device, stream);
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

bool gated_gemm_fits(const GatedGemmArgs& args, const DeviceInfo& device) {
  const bool fp8 = args.w.dtype == DType::e4m3;
  return device.capability == 90 && device.multiprocessors >= 2 && args.tokens > kSkinnyTokens &&
         (fp8 || args.w.dtype == DType::bf16) && args.act == DType::bf16 && args.quantize.row_scales == nullptr &&
         (fp8 || !args.quantize) && args.w.cols * size_of(args.w.dtype) % 16 == 0 &&
         args.w.rows % (2 * kTileColumns) == 0 && depth(args) > kSlots && aligned(args.w.data) && aligned(args.x) &&
         aligned(args.out) && aligned(args.w.scales) && compiled();
}

void gated_gemm(const GatedGemmArgs& args, const DeviceInfo& device, const Stream& stream) {
  const auto run = args.w.dtype == DType::bf16 ? launch<Bf16, Bf16>
                   : args.quantize             ? launch<E4m3, E4m3>
                                               : launch<E4m3, Bf16>;
  run(args, device, stream);
}

}  // namespace gemma_cuda::cuda
