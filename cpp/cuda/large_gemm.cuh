// out = x w^T for many tokens in bf16 or FP8 with f32 sums, on warpgroup products of sm_90a: what kernels share that do
// something with the products before they are written (gated_gemm.cu, rope_gemm.cu).
//
// A block's tile is 128 tokens by 256 rows of w, in two halves that need not follow each other. Of three warpgroups one
// is the producer: a thread of it keeps a ring of four slots full by tensor copies, each 128 bytes of a row of x and w.
// The two consumers have 64 tokens each and multiply them with all 256 rows of w at once, so a thread has both halves
// of the same token and column in its registers, and finishes them there. The blocks stay and take tile after tile; the
// producer is at the next one while the last is being finished.
//
// Two blocks, a cluster, take two tiles of tokens and the same rows of w. Each brings one half of the weights to both
// (multicast): so a block asks the L2 cache for 32 KiB a slot and not 48, which it could not deliver. A slot is filled
// again only when the consumers of both blocks are through with it.
//
// Tiles go through `group` bands of tokens first, then through the rows of w: at any time the blocks work on as many
// rows of w as of x, and a group of bands, 12 MB of gemma-7b, stays in the L2 cache while the weights pass by.
//
// Letting one consumer run some slots behind the other, for products while the first finishes a tile, made the gated
// product 1 to 3 % slower.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/barrier.cuh"
#include "cuda/check.h"
#include "cuda/launch.cuh"
#include "cuda/skinny_gemm.h"
#include "cuda/tensor_copy.cuh"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

namespace gemma_cuda::cuda {

constexpr int kGroup = 128;    // threads of a warpgroup
constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kThreads = (1 + kConsumers) * kGroup;
constexpr uint32_t kGroupTokens = 64;  // of a consumer
constexpr uint32_t kWarpTokens = 16;
constexpr uint32_t kTileTokens = kConsumers * kGroupTokens;
constexpr uint32_t kHalfRows = 128;  // of w
constexpr uint32_t kTileRows = 2 * kHalfRows;
constexpr uint32_t kFragments = kTileRows / 8;  // of a thread's sums
constexpr uint32_t kSlots = 4;
constexpr uint32_t kRowBytes = 128;  // of a slot
constexpr uint32_t kXBytes = kTileTokens * kRowBytes, kHalfBytes = kHalfRows * kRowBytes;
constexpr uint32_t kSlotBytes = kXBytes + 2 * kHalfBytes;
constexpr uint32_t kRingBytes = kSlots * kSlotBytes + 1024;  // to begin at a multiple of it

template <class Type>
constexpr uint32_t kElements = std::is_same_v<Type, E4m3> ? 128 : 64;  // in 128 bytes

struct LargeGemm {
  uint32_t tokens;
  uint32_t depth;      // slots of a tile
  uint32_t bands;      // of the tokens of a cluster
  uint32_t group;      // bands
  uint32_t row_tiles;  // how many there are along the rows of w
  uint32_t tile_step;  // from a tile's first row of w to the next one's
  uint32_t half_step;  // from its first half's to the second's
  bool fresh;          // the kernel before has written w
  bool one_x_scale;
  const float* w_scales;  // FP8: of the rows of w
  const float* x_scales;  // FP8: of the tokens, or one for all

  __device__ uint32_t first_row(uint32_t row_tile, uint32_t half) const {
    return row_tile * tile_step + half * half_step;
  }
  __device__ float x_scale(uint32_t token) const { return x_scales[one_x_scale ? 0 : min(token, tokens - 1)]; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr uint32_t kScaleBytes = kTileRows * sizeof(float);

// Registers of a thread, of as many as the block was launched with: 168 each.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = (168 * (1 + kConsumers) - kProducerRegisters) / kConsumers;

struct LargeShared {
  Barrier full[kSlots], empty[kSlots];
  alignas(16) float scales[kTileRows];  // of the tile's rows of w
};

template <int Cluster>
__device__ inline uint32_t rank() {
  return Cluster == 1 ? 0 : blockIdx.x % Cluster;
}

// The tiles of a block, each by its first token and where it is among those along the rows of w.
template <int Cluster>
class Tiles {
 public:
  __device__ explicit Tiles(const LargeGemm& args) : args_(args), at_(blockIdx.x / Cluster) { find(); }
  __device__ bool more() const { return at_ < args_.bands * args_.row_tiles; }
  __device__ void next() {
    at_ += gridDim.x / Cluster;
    find();
  }
  uint32_t token, row_tile;

 private:
  __device__ void find() {
    const uint32_t first = at_ / (args_.group * args_.row_tiles) * args_.group,
                   in_group = at_ - first * args_.row_tiles,
                   bands = min(args_.group, max(args_.bands, first + 1) - first);
    token = ((first + in_group % bands) * Cluster + rank<Cluster>()) * kTileTokens;
    row_tile = in_group / bands;
  }
  const LargeGemm& args_;
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

// How the rows of a half of w come to shared memory, the cluster's: in their order, or in that of run_map().
struct InOrder {};
struct InRuns {};
template <class Rows, int Cluster>
__device__ inline void copy_half(uint32_t to, const CUtensorMap& w, uint32_t row, uint32_t column, Barrier& barrier) {
  if constexpr (std::is_same_v<Rows, InOrder>)
    Cluster == 1 ? copy_box(to, w, row, column, barrier) : copy_box_to_both(to, w, row, column, barrier);
  else
    Cluster == 1 ? copy_runs(to, w, row, column, barrier) : copy_runs_to_both(to, w, row, column, barrier);
}

// One thread, of all that the consumers multiply.
template <class Type, class Rows, int Cluster>
__device__ void produce(const LargeGemm& args, const CUtensorMap& w, const CUtensorMap& x, uint32_t ring,
                        LargeShared& shared) {
  Tiles<Cluster> tiles(args);
  auto bring_half = [&](uint32_t half, uint32_t slot, uint32_t step) {
    copy_half<Rows, Cluster>(ring + slot * kSlotBytes + kXBytes + half * kHalfBytes, w,
                             args.first_row(tiles.row_tile, half), step * kElements<Type>, shared.full[slot]);
  };
  // With the last slot come the scales: it is asked for when all consumers are in this tile, through with the scales of
  // the one before.
  auto bring_weights = [&](uint32_t slot, uint32_t step) {
    const bool scales = std::is_same_v<Type, E4m3> && step == args.depth - 1;
    Barrier& full = shared.full[slot];
    arrive_expecting(full, kSlotBytes + (scales ? kScaleBytes : 0));
    if constexpr (Cluster == 1) {
      bring_half(0, slot, step);
      bring_half(1, slot, step);
    } else {
      bring_half(rank<Cluster>(), slot, step);
    }
    if (scales)
      for (uint32_t half = 0; half < 2; ++half)
        copy_row(shared.scales + half * kHalfRows, args.w_scales + args.first_row(tiles.row_tile, half),
                 kScaleBytes / 2, full);
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
  __device__ explicit Release(LargeShared& shared) : empty_(shared_address(shared.empty)), lane_(threadIdx.x % 32) {
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

// A consumer's products, tile after tile as the producer brings them.
template <class Type, int Cluster>
class Products {
 public:
  __device__ Products(const LargeGemm& args, uint32_t ring, LargeShared& shared, int group)
      : depth_(args.depth), ring_(ring), group_(group), shared_(shared), free_(shared) {}

  // The next tile's. The first slot stands apart: so the compiler knows that the registers are free until then.
  __device__ void operator()(float (&sums)[kFragments][4]) {
    start_slot(sums, false);
    turn_.next();
    for (uint32_t step = 1; step < depth_; ++step, turn_.next()) {
      start_slot(sums, true);
      wait_products<1>();  // those of the slot before
      free_(turn_.before());
    }
    wait_products<0>();
    pin(sums);
    free_(turn_.before());
  }

 private:
  __device__ void start_slot(float (&sums)[kFragments][4], bool keep) const {
    const uint32_t x = ring_ + turn_.slot * kSlotBytes + group_ * kGroupTokens * kRowBytes,
                   w = ring_ + turn_.slot * kSlotBytes + kXBytes;
    wait(shared_.full[turn_.slot], turn_.parity);
    begin_products();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      multiply_columns(Type{}, sums, operand(x + 32 * k, 0), operand(w + 32 * k, 0), keep || k > 0);
    commit_products();
  }

  const uint32_t depth_, ring_;
  const int group_;
  LargeShared& shared_;
  const Release<Cluster> free_;
  Turn turn_;
};

// The whole kernel: produce(ring) by one thread, consume(ring, group) by each consumer.
template <int Cluster, class Produce, class Consume>
__device__ inline void run_large_gemm(const LargeGemm& args, const char* memory, LargeShared& shared, Produce produce,
                                      Consume consume) {
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
    if (threadIdx.x == 0) produce(ring);
  } else {
    grow_registers<kConsumerRegisters>();
    wait_for_last();  // it may still read out, or write the scales of x
    consume(ring, threadIdx.x / kGroup - 1);
  }
  if constexpr (Cluster > 1) meet<Cluster>();  // the other block arrives at barriers of this one to its end
}

#endif

inline uint32_t token_tiles(uint32_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

// Many tokens gain by sharing weights; few leave a cluster less even shares of the multiprocessors.
inline bool by_clusters(uint32_t tokens) {
  const uint32_t tiles = token_tiles(tokens);
  return tiles == 2 || tiles > 8;
}

// In slots of a tile.
inline uint32_t depth(const Matrix& w) {
  return static_cast<uint32_t>((w.cols * size_of(w.dtype) + kRowBytes - 1) / kRowBytes);
}

// What both kernels need, besides their rows of w being those of whole tiles. `Args` are GemmArgs or GatedGemmArgs.
template <class Args>
bool large_gemm_fits(const Args& args, const DeviceInfo& device) {
  return device.capability == 90 && device.multiprocessors >= 2 && args.tokens > kSkinnyTokens &&
         (args.w.dtype == DType::e4m3 || args.w.dtype == DType::bf16) &&
         args.w.cols * size_of(args.w.dtype) % 16 == 0 && depth(args.w) > kSlots && aligned(args.w.data) &&
         aligned(args.x) && aligned(args.w.scales);
}

template <class Type, int Cluster, class Args>
LargeGemm large_gemm(const Args& args, uint32_t tile_step, uint32_t half_step) {
  return {.tokens = args.tokens,
          .depth = depth(args.w),
          .bands = (token_tiles(args.tokens) + Cluster - 1) / Cluster,
          .group = std::is_same_v<Type, E4m3> ? 16 : 8,
          .row_tiles = args.w.rows / kTileRows,
          .tile_step = tile_step,
          .half_step = half_step,
          .fresh = args.w.fresh,
          .one_x_scale = args.x_scale.scale != nullptr,
          .w_scales = args.w.scales,
          .x_scales = args.x_scale.scale != nullptr ? args.x_scale.scale : args.x_scale.row_scales};
}

// As launch_early(), of as many clusters as there is room or work for.
template <class... Parameters, class... Arguments>
void launch_clusters(const LargeGemm& work, unsigned size, size_t shared, const DeviceInfo& device,
                     const Stream& stream, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {size, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = std::min<uint32_t>(device.multiprocessors / size, work.bands * work.row_tiles) * size;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared;
  config.stream = stream.stream;
  config.attrs = attributes;
  config.numAttrs = stream.overlaps ? 2 : 1;
  GEMMA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace gemma_cuda::cuda
