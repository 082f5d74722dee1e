// Prefill attention for sm_90: what prefill_attention.cu computes, on warpgroup products (wgmma).
//
// A block takes a query tile of one head. Two consumer warpgroups have 64 queries each; a third, the producer, keeps
// two tiles of keys and two of values in flight for them (cp.async, row by row through the block table, so any page
// size will do), and gives most of its registers to them. A consumer starts S = Q K^T of a tile, then O += P V of the
// tile before, and computes the softmax of S while the second product runs; the other warpgroup's products fill what
// gaps are left. Q lies in shared memory, P and O in registers.
//
// Keys and values in FP8 pass through the producer's registers, a whole tile ahead, and become f16; so do the queries.
//
// Reaches, on an H100 for two prompts of 4096 tokens and 16 heads of 256, TFLOP/s: 521, and 412 where it has to widen
// FP8. Asking for FP8 rows by cp.async, or widening them by bits instead of conversions, is slower.
#include "cuda/barrier.cuh"
#include "cuda/ops.h"
#include "cuda/prefill.cuh"
#include "cuda/wgmma.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr int kStages = 2;
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kConsumers = 2;
constexpr int kRows = 64;  // queries of a consumer
constexpr int kThreads = kGroup * (1 + kConsumers);
constexpr int kBlockColumns = 64, kRowBytes = 128;  // of a swizzled block
static_assert(kRows * kConsumers == kQueryTile);

template <int HeadDim, int Keys>
struct Layout {
  static constexpr uint32_t kBlocks = HeadDim / kBlockColumns;
  static constexpr uint32_t kQueryBlock = kQueryTile * kRowBytes, kKeyBlock = Keys * kRowBytes;  // bytes
  static constexpr uint32_t kQueries = kBlocks * kQueryBlock, kTile = kBlocks * kKeyBlock;
  static constexpr uint32_t kBytes = kQueries + 2 * kStages * kTile + 1024;  // to begin at a multiple of 1024

  uint32_t base;
  __device__ uint32_t queries() const { return base; }
  __device__ uint32_t keys(uint32_t stage) const { return base + kQueries + 2 * stage * kTile; }
  __device__ uint32_t values(uint32_t stage) const { return keys(stage) + kTile; }
};

struct Barriers {
  Barrier keys_full[kStages], values_full[kStages], keys_empty[kStages], values_empty[kStages];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr uint32_t kNowhere = ~0u;

// The order of a row's chunks of eight elements in shared memory. Keys' is the queries', values' is the results'.
template <int HeadDim>
struct Bf16Chunks {
  __device__ static constexpr int place(int chunk) { return chunk; }
  __device__ static constexpr int at(int place) { return place; }
};
// Sixteen elements of FP8 that a lane widens become chunks a half row apart: eight lanes fill all banks.
template <int HeadDim>
struct F16Chunks {
  static constexpr int kHalf = HeadDim / 16;
  __device__ static constexpr int place(int chunk) { return chunk % 2 * kHalf + chunk / 2; }
  __device__ static constexpr int at(int place) { return place % kHalf * 2 + place / kHalf; }
};
template <int HeadDim>
Bf16Chunks<HeadDim> chunks_of(Bf16);
template <int HeadDim>
F16Chunks<HeadDim> chunks_of(F16);
template <class Type, int HeadDim>
using Chunks = decltype(chunks_of<HeadDim>(Type{}));

// Where a 16-byte chunk of a row lies in a tile whose blocks are `block` bytes.
__device__ uint32_t chunk_at(uint32_t tile, uint32_t block, int row, int chunk) {
  return tile + chunk / 8 * block + row * kRowBytes + ((chunk ^ row) % 8 << 4);
}

// A warp has every fourth row of a tile, lane i knows where the i-th of them begins, and so many lanes take one. Where
// the lane's chunk of row 4 * (i + lane / Lanes) + warp goes, i being one of the multiples of 32 / Lanes.
template <int Lanes, int Keys>
__device__ uint32_t lane_chunk(uint32_t tile, int i, int chunk, int warp, int lane) {
  constexpr int kAtOnce = 32 / Lanes;
  static_assert(Keys / 4 <= 32 && Keys / 4 % kAtOnce == 0);
  const int first = warp + 4 * (lane / Lanes + i % 2);  // of the rows whose chunks are in the same order
  return chunk_at(tile, Keys * kRowBytes, first, chunk) + i / 2 * 8 * kRowBytes;
}

template <int HeadDim, int Keys>
__device__ void fetch(const bf16_t* from, uint32_t tile, uint32_t mine, int warp, int lane) {
  constexpr int kChunks = HeadDim / 8, kAtOnce = 32 / kChunks;
#pragma unroll
  for (int i = 0; i < Keys / 4; i += kAtOnce) {
    const uint32_t row = __shfl_sync(~0u, mine, i + lane / kChunks);
    const bool there = row != kNowhere;
    copy_async(lane_chunk<kChunks, Keys>(tile, i, lane % kChunks, warp, lane),
               from + size_t{there ? row : 0} * HeadDim + lane % kChunks * 8, there);
  }
}

// The same of FP8, through registers.
template <int HeadDim, int Keys>
struct Fp8Rows {
  static constexpr int kRuns = HeadDim / 16, kAtOnce = 32 / kRuns, kLoads = Keys / 4 / kAtOnce;
  uint4 held[kLoads];

  __device__ void ask(const uint8_t* from, uint32_t mine, int lane) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t row = __shfl_sync(~0u, mine, i * kAtOnce + lane / kRuns);
      const uint4* const run = reinterpret_cast<const uint4*>(from + size_t{row} * HeadDim) + lane % kRuns;
      held[i] = row == kNowhere ? uint4{} : __ldcg(run);
    }
  }
  __device__ void put(uint32_t tile, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      uint4 chunks[2];
      widen_e4m3(held[i], chunks[0], chunks[1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = F16Chunks<HeadDim>::place(2 * (lane % kRuns) + half);
        store_chunk(lane_chunk<kRuns, Keys>(tile, i * kAtOnce, chunk, warp, lane), chunks[half]);
      }
    }
    publish_to_products();
  }
};

// Both rows of a tile are asked for when those of the tile before have been put, a whole turn ahead.
template <int HeadDim, int Keys>
__device__ void produce(uint8_t, const Prefill& args, const PrefillWork& work, Layout<HeadDim, Keys> shared,
                        Barriers& barriers, uint32_t first_key) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto *const keys = static_cast<const uint8_t*>(args.keys), *const values =
                                                                       static_cast<const uint8_t*>(args.values);
  Fp8Rows<HeadDim, Keys> key_rows, value_rows;
  uint32_t mine = work.row_of(args, first_key, warp, lane, Keys);
  key_rows.ask(keys, mine, lane);
  value_rows.ask(values, mine, lane);
  uint32_t turn = 0;
  for (uint32_t key = first_key; key < work.end_key; key += Keys, ++turn) {
    const uint32_t stage = turn % kStages, parity = turn / kStages % 2;
    mine = work.row_of(args, key + Keys, warp, lane, Keys);
    wait(barriers.keys_empty[stage], parity ^ 1);
    key_rows.put(shared.keys(stage), warp, lane);
    arrive(barriers.keys_full[stage]);
    key_rows.ask(keys, mine, lane);
    wait(barriers.values_empty[stage], parity ^ 1);
    value_rows.put(shared.values(stage), warp, lane);
    arrive(barriers.values_full[stage]);
    value_rows.ask(values, mine, lane);
  }
}

template <int HeadDim, int Keys>
__device__ void produce(bf16_t, const Prefill& args, const PrefillWork& work, Layout<HeadDim, Keys> shared,
                        Barriers& barriers, uint32_t first_key) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto *const keys = static_cast<const bf16_t*>(args.keys), *const values =
                                                                      static_cast<const bf16_t*>(args.values);
  uint32_t mine = work.row_of(args, first_key, warp, lane, Keys);
  uint32_t turn = 0;
  for (uint32_t key = first_key; key < work.end_key; key += Keys, ++turn) {
    const uint32_t stage = turn % kStages, parity = turn / kStages % 2;
    const uint32_t next = work.row_of(args, key + Keys, warp, lane, Keys);
    wait(barriers.keys_empty[stage], parity ^ 1);
    fetch<HeadDim, Keys>(keys, shared.keys(stage), mine, warp, lane);
    arrive_after_copies(barriers.keys_full[stage]);
    wait(barriers.values_empty[stage], parity ^ 1);
    fetch<HeadDim, Keys>(values, shared.values(stage), mine, warp, lane);
    arrive_after_copies(barriers.values_full[stage]);
    mine = next;
  }
  wait_copies<0>();  // none may be under way when the block ends
}

// Brings a chunk of queries to shared memory, as what they are multiplied as.
__device__ void bring_queries(Bf16, uint32_t to, const bf16_t* from, bool there) { copy_async(to, from, there); }
__device__ void bring_queries(F16, uint32_t to, const bf16_t* from, bool there) {
  const uint4 q = there ? *reinterpret_cast<const uint4*>(from) : uint4{};
  store_chunk(to, make_uint4(F16::of_bf16(q.x), F16::of_bf16(q.y), F16::of_bf16(q.z), F16::of_bf16(q.w)));
}

// Brings a consumer's queries to shared memory; rows past the last become zeros.
template <class Type, int HeadDim, int Keys>
__device__ void load_queries(Type type, const bf16_t* from, size_t stride, uint32_t rows, Layout<HeadDim, Keys> shared,
                             int group) {
  constexpr int kChunks = HeadDim / 8;
  for (int i = threadIdx.x % kGroup; i < kRows * kChunks; i += kGroup) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool there = row < static_cast<int>(rows);
    const int place = Chunks<Type, HeadDim>::place(chunk);
    bring_queries(type, chunk_at(shared.queries(), shared.kQueryBlock, group * kRows + row, place),
                  from + (there ? row * stride + chunk * 8 : 0), there);
  }
  commit_copies();
  wait_copies<0>();
  publish_to_products();
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroup) : "memory");
}

template <class Type, int HeadDim, int Keys>
__device__ void consume(Type type, const Prefill& args, const PrefillWork& work, Layout<HeadDim, Keys> shared,
                        Barriers& barriers, uint32_t first_key, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint32_t rows = min(uint32_t{kRows}, work.rows - group * kRows);
  const size_t at = work.at + group * kRows * work.stride;
  load_queries(type, args.q + at, work.stride, rows, shared, group);

  const Sight sight{work.position + group * kRows + warp * 16, args.window};
  // The last tile may be past all of this consumer's queries.
  const uint32_t tiles = (work.position + group * kRows + rows - first_key + Keys - 1) / Keys;
  float out[HeadDim / 8][4] = {}, scores[Keys / 8][4], shrink[2];
  uint32_t p[Keys / 16][4];
  RunningSoftmax softmax;
  const ScoreScale score_scale = args.score_of(work.kv_head);

  const uint64_t queries = operand(shared.queries() + group * kRows * kRowBytes, 0);
  const uint64_t keys = operand(shared.keys(0), 0), values = operand(shared.values(0), shared.kKeyBlock);
  constexpr uint32_t kStage = 2 * shared.kTile;

  auto start_scores = [&](uint32_t turn) {
    const uint32_t stage = turn % kStages;
    wait(barriers.keys_full[stage], turn / kStages % 2);
    publish_to_products();
    begin_products();
#pragma unroll
    for (int k = 0; k < HeadDim / 16; ++k)
      multiply_columns(type, scores, further(queries, k / 4 * shared.kQueryBlock + k % 4 * 32),
                       further(keys, stage * kStage + k / 4 * shared.kKeyBlock + k % 4 * 32), k > 0);
    commit_products();
  };
  auto start_out = [&](uint32_t turn) {
    const uint32_t stage = turn % kStages;
    wait(barriers.values_full[stage], turn / kStages % 2);
    publish_to_products();
    begin_products();
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k)
      multiply_rows(type, out, p[k], further(values, stage * kStage + k * 16 * kRowBytes), true);
    commit_products();
  };
  auto free = [&](Barrier& barrier) {
    if (lane == 0) arrive(barrier);
  };
  auto to_probabilities = [&](uint32_t turn) {
    const float factor = score(scores, score_scale, sight, first_key + turn * Keys, lane);
    return softmax.add(scores, factor, shrink);
  };

  start_scores(0);
  wait_products<0>();
  pin(scores);
  free(barriers.keys_empty[0]);
  to_probabilities(0);
#pragma unroll
  for (int k = 0; k < Keys / 16; ++k) narrow(type, p[k], scores, k);
  for (uint32_t turn = 1; turn < tiles; ++turn) {
    pin(scores);
    start_scores(turn);
    pin(out);
    start_out(turn - 1);
    wait_products<1>();
    pin(scores);
    free(barriers.keys_empty[turn % kStages]);
    const bool shrinks = to_probabilities(turn);
    wait_products<0>();
    pin(out);
    free(barriers.values_empty[(turn - 1) % kStages]);
    if (shrinks) shrink_sums(out, shrink);
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k) narrow(type, p[k], scores, k);
  }
  pin(out);
  start_out(tiles - 1);
  wait_products<0>();
  pin(out);
  const uint32_t mine = warp * 16;
  store_rows<Chunks<Type, HeadDim>>(out, softmax, args.out_factor(work.kv_head), args.out, at + mine * work.stride,
                                    work.stride, mine < rows ? min(16u, rows - mine) : 0, lane);
}

#endif

// Registers of a thread, of as many as the block was launched with: 168 each. A producer of FP8 holds what it converts.
template <class Cache>
constexpr int kProducerRegisters = sizeof(Cache) == 1 ? 88 : 40;
template <class Cache>
constexpr int kConsumerRegisters = (168 * (1 + kConsumers) - kProducerRegisters<Cache>) / kConsumers;

template <int HeadDim, int Keys, class Cache>
__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(Prefill args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  __shared__ Barriers barriers;
  const Layout<HeadDim, Keys> shared{(shared_address(memory) + 1023) / 1024 * 1024};
  allow_next();
  wait_for_last();
  PrefillWork work;
  if (!work.find(args, HeadDim)) return;
  const int consumers = work.rows > kRows ? 2 : 1;
  if (threadIdx.x == 0)
    for (int stage = 0; stage < kStages; ++stage) {
      init(barriers.keys_full[stage], kGroup);
      init(barriers.values_full[stage], kGroup);
      init(barriers.keys_empty[stage], consumers * kGroup / 32);
      init(barriers.values_empty[stage], consumers * kGroup / 32);
    }
  __syncthreads();
  const uint32_t first_key = work.first_key / Keys * Keys;
  if (threadIdx.x < kGroup) {
    shrink_registers<kProducerRegisters<Cache>>();
    produce<HeadDim, Keys>(Cache{}, args, work, shared, barriers, first_key);
  } else {
    grow_registers<kConsumerRegisters<Cache>>();
    const int group = __shfl_sync(~0u, threadIdx.x / kGroup, 0) - 1;  // known to be the same in a warp
    if (group < consumers) consume(typename CacheType<Cache>::Type{}, args, work, shared, barriers, first_key, group);
  }
#endif
}

template <int HeadDim, int Keys, class Cache>
bool launch(const Prefill& args, const Stream& stream) {
  constexpr int kBytes = Layout<HeadDim, Keys>::kBytes;
  const auto kernel = prefill_kernel<HeadDim, Keys, Cache>;
  cudaFuncAttributes attributes;
  GEMMA_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.sharedSizeBytes == 0) return false;  // compiled without its body
  allow_shared(kernel, kBytes);
  launch_early(stream, dim3(args.heads, args.tiles), kThreads, kBytes, kernel, args);
  return true;
}

template <int HeadDim, int Keys>
bool launch(const Prefill& args, const Stream& stream) {
  return args.key_scales != nullptr ? launch<HeadDim, Keys, uint8_t>(args, stream)
                                    : launch<HeadDim, Keys, bf16_t>(args, stream);
}

}  // namespace

bool prefill_hopper(const Prefill& args, uint32_t head_dim, const DeviceInfo& device, const Stream& stream) {
  if (device.capability != 90) return false;
  if (head_dim == 128) return launch<128, 128>(args, stream);
  if (head_dim == 256) return launch<256, 64>(args, stream);
  return false;
}

}  // namespace gemma_cuda::cuda
