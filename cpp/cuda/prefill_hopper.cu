// Prefill attention for sm_90: what prefill_attention.cu computes, on warpgroup products (wgmma).
//
// A multiprocessor has one block, which takes query tiles of a head one after the other. Two consumer warpgroups have
// 64 queries each; a third, the producer, keeps two tiles of keys and two of values in flight for them (cp.async, row
// by row through the block table, so any page size will do), those of the next query tile among them, and gives most of
// its registers to them. A consumer starts S = Q K^T of a tile, then O += P V of the tile before, and computes the
// softmax of S while the second product runs; the other warpgroup's products fill what gaps are left. Q lies in shared
// memory, P and O in registers. The next queries come while results go.
//
// Query tiles are dealt out by a few heads at a time, so that blocks find in the L2 cache what others have read: keys
// and values of all heads, of 8192 tokens 134 MB in bf16, have no room there.
//
// Keys and values in FP8 pass through the producer's registers, a whole tile ahead, and become f16; so do the queries.
//
// Reaches, on an H100 with 16 heads of 256, for two prompts of 4096 tokens 600 TFLOP/s, for eight of 1024 420; where it
// has to widen FP8 490 and 330. There what the producer does a tile counts: asking for FP8 rows by cp.async, or
// widening them by bits instead of conversions, is slower. Turns of the consumers at the products (named barriers) gain
// nothing.
#include <algorithm>

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

// The order of a row's chunks of eight elements in shared memory. Keys' is the queries', values' is the results'.
template <int HeadDim>
struct Bf16Chunks {
  __device__ static constexpr int place(int chunk) { return chunk; }
};
// Sixteen elements of FP8 that a lane widens become chunks a half row apart: eight lanes fill all banks.
template <int HeadDim>
struct F16Chunks {
  static constexpr int kHalf = HeadDim / 16;
  __device__ static constexpr int place(int chunk) { return chunk % 2 * kHalf + chunk / 2; }
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
    copy_async(lane_chunk<kChunks, Keys>(tile, i, lane % kChunks, warp, lane),
               from + lane % kChunks * 8 + size_t{row} * HeadDim, true);
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
      held[i] = __ldcg(reinterpret_cast<const uint4*>(from + lane % kRuns * 16 + size_t{row} * HeadDim));
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
  }
};

// The tiles that a producer brings, of one work after the other.
template <int HeadDim, int Keys>
struct Incoming {
  const Prefill& args;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Works works;
  PrefillWork work;
  uint32_t key;
  bool more;
  uint32_t turn = 0;

  __device__ explicit Incoming(const Prefill& prefill) : args(prefill) { begin(); }
  __device__ void begin() {
    more = works.next(args, HeadDim, work);
    key = work.first_tile(Keys);
  }
  __device__ void next() {
    ++turn;
    key += Keys;
    if (key >= work.end_key) begin();
  }
  // Which row of the cache is the lane's. Past the last key it is that key again, which is as good: nobody sees it.
  __device__ uint32_t mine() const {
    return more && lane < Keys / 4 ? work.row_of(args, min(key + warp + 4 * lane, work.end_key - 1)) : 0;
  }
  __device__ uint32_t stage() const { return turn % kStages; }
  __device__ uint32_t parity() const { return turn / kStages % 2; }
};

// A tile's rows are asked for when those of the tile before have been put, a whole turn ahead.
template <int HeadDim, int Keys>
__device__ void produce(uint8_t, const Prefill& args, Layout<HeadDim, Keys> shared, Barriers& barriers) {
  const auto* const keys = static_cast<const uint8_t*>(args.keys);
  const auto* const values = static_cast<const uint8_t*>(args.values);
  Incoming<HeadDim, Keys> tiles(args);
  const int lane = tiles.lane, warp = tiles.warp;
  Fp8Rows<HeadDim, Keys> key_rows, value_rows;
  key_rows.ask(keys, tiles.mine(), lane);
  value_rows.ask(values, tiles.mine(), lane);
  while (tiles.more) {
    const uint32_t stage = tiles.stage(), parity = tiles.parity();
    wait(barriers.keys_empty[stage], parity ^ 1);
    key_rows.put(shared.keys(stage), warp, lane);
    arrive(barriers.keys_full[stage]);
    wait(barriers.values_empty[stage], parity ^ 1);
    value_rows.put(shared.values(stage), warp, lane);
    arrive(barriers.values_full[stage]);
    tiles.next();
    const uint32_t mine = tiles.mine();
    key_rows.ask(keys, mine, lane);
    value_rows.ask(values, mine, lane);
  }
}

template <int HeadDim, int Keys>
__device__ void produce(bf16_t, const Prefill& args, Layout<HeadDim, Keys> shared, Barriers& barriers) {
  const auto* const keys = static_cast<const bf16_t*>(args.keys);
  const auto* const values = static_cast<const bf16_t*>(args.values);
  Incoming<HeadDim, Keys> tiles(args);
  const int lane = tiles.lane, warp = tiles.warp;
  uint32_t mine = tiles.mine();
  while (tiles.more) {
    const uint32_t stage = tiles.stage(), parity = tiles.parity();
    wait(barriers.keys_empty[stage], parity ^ 1);
    fetch<HeadDim, Keys>(keys, shared.keys(stage), mine, warp, lane);
    arrive_after_copies(barriers.keys_full[stage]);
    tiles.next();
    const uint32_t next = tiles.mine();
    wait(barriers.values_empty[stage], parity ^ 1);
    fetch<HeadDim, Keys>(values, shared.values(stage), mine, warp, lane);
    arrive_after_copies(barriers.values_full[stage]);
    mine = next;
  }
  wait_copies<0>();  // none may be under way when the block ends
}

// What is a consumer's of a work.
struct Share {
  uint32_t rows, position;  // queries, the first one's position
  size_t at;                // of its first one's elements, in q and out

  __device__ Share(const PrefillWork& work, int group) {
    const uint32_t before = group * kRows;
    rows = work.rows > before ? min(uint32_t{kRows}, work.rows - before) : 0;
    position = work.position + before;
    at = work.at + before * work.stride;
  }
};

// A consumer's queries. A thread makes f16 of what it has copied itself.
template <class Type, int HeadDim, int Keys>
struct Queries {
  static constexpr int kChunks = HeadDim / 8, kAtOnce = kGroup / kChunks, kEach = kRows / kAtOnce;  // rows
  static_assert(8 % kAtOnce == 0);
  const Layout<HeadDim, Keys> shared;
  const int group, thread = threadIdx.x % kGroup;

  // Of the thread's chunk of its i-th row.
  __device__ uint32_t place(int i) const {
    const int first = thread / kChunks + i * kAtOnce % 8;  // of the rows whose chunks are in the same order
    return chunk_at(shared.queries(), shared.kQueryBlock, first, Chunks<Type, HeadDim>::place(thread % kChunks)) +
           (group * kRows + i * kAtOnce / 8 * 8) * kRowBytes;
  }
  // Starts to bring them; those past the last are zeros.
  __device__ void ask(const bf16_t* q, const Share& share, size_t stride) const {
    sync();  // those before have been used
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t row = i * kAtOnce + thread / kChunks;
      const bool there = row < share.rows;
      copy_async(place(i), q + share.at + (there ? row * stride + thread % kChunks * 8 : 0), there);
    }
    commit_copies();
  }
  __device__ void await() const {
    wait_copies<0>();
    if constexpr (std::is_same_v<Type, F16>) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const uint4 q = load_chunk(place(i));
        store_chunk(place(i), make_uint4(F16::of_bf16(q.x), F16::of_bf16(q.y), F16::of_bf16(q.z), F16::of_bf16(q.w)));
      }
    }
    publish_to_products();
    sync();
  }
  __device__ void sync() const { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroup) : "memory"); }
};

// Of four lanes that have a word each of four things, gives each lane one of these.
__device__ inline void exchange(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t &low = words[i], &high = words[i + step];
      const uint32_t got = __shfl_xor_sync(~0u, upper ? low : high, step);
      (upper ? low : high) = got;
    }
  }
}

// A row's results of four lanes: chunks of eight, from chunk 4 * i on in bf16, 8 * i in E4M3. A lane has two of each
// and gets 16 bytes. `take` gives those two of a chunk.
template <class F>
__device__ uint4 gather_bf16(int i, int lane, F take) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 x = take(4 * i + j);
    words[j] = Bf16::pack(x.x, x.y);
  }
  exchange(words, lane);
  return make_uint4(words[0], words[1], words[2], words[3]);
}
template <class F>
__device__ uint4 gather_e4m3(int i, int lane, F take) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 x = take(8 * i + 2 * j), y = take(8 * i + 2 * j + 1);
    words[j] = narrow_e4m3(x.x, x.y) | narrow_e4m3(y.x, y.y) << 16;
  }
  exchange(words, lane);
  return make_uint4(__byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410),
                    __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x7632));
}

// What store_rows() does, by whole chunks.
template <class Chunks, int N>
__device__ void store_chunks(const float (&out)[N][4], const RunningSoftmax& softmax, float factor,
                             const AttentionOut& to, size_t at, size_t stride, uint32_t rows, int lane) {
  static_assert(N % 8 == 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = factor / softmax.mass(half);
    const uint32_t row = lane / 4 + 8 * half;
    const size_t begin = at + row * stride;
    auto take = [&](int chunk) {
      const float(&of)[4] = out[Chunks::place(chunk)];
      return make_float2(of[2 * half] * inverse, of[2 * half + 1] * inverse);
    };
    if (to.scale != nullptr) {
      auto* const line = reinterpret_cast<uint4*>(static_cast<uint8_t*>(to.data) + begin);
#pragma unroll
      for (int i = 0; i < N / 8; ++i) {
        const uint4 chunks = gather_e4m3(i, lane, take);
        if (row < rows) line[4 * i + lane % 4] = chunks;
      }
    } else {
      auto* const line = reinterpret_cast<uint4*>(static_cast<bf16_t*>(to.data) + begin);
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const uint4 chunk = gather_bf16(i, lane, take);
        if (row < rows) line[4 * i + lane % 4] = chunk;
      }
    }
  }
}

// What a consumer does with the tiles as they come: products, softmax, and making room for others.
template <class Type, int HeadDim, int Keys>
struct Consumer {
  using Memory = Layout<HeadDim, Keys>;
  static constexpr uint32_t kStage = 2 * Memory::kTile;
  Barriers& barriers;
  const uint64_t queries, keys, values;  // where they are
  const int lane = threadIdx.x % 32;
  uint32_t turn = 0;  // of all tiles
  float out[HeadDim / 8][4], scores[Keys / 8][4];
  uint32_t p[Keys / 16][4];

  __device__ Consumer(const Memory& shared, Barriers& of_block, int group)
      : barriers(of_block),
        queries(operand(shared.queries() + group * kRows * kRowBytes, 0)),
        keys(operand(shared.keys(0), 0)),
        values(operand(shared.values(0), Memory::kKeyBlock)) {}

  // A fence here makes all that the barrier shows this thread visible to its products. The producer, which has no time
  // to spare, would have to wait in it for its own stores.
  __device__ static void await(Barrier& full, uint32_t at) {
    wait(full, at / kStages % 2);
    publish_to_products();
  }
  __device__ void start_scores(uint32_t at) {
    const uint32_t stage = at % kStages;
    await(barriers.keys_full[stage], at);
    begin_products();
#pragma unroll
    for (int k = 0; k < HeadDim / 16; ++k)
      multiply_columns(Type{}, scores, further(queries, k / 4 * Memory::kQueryBlock + k % 4 * 32),
                       further(keys, stage * kStage + k / 4 * Memory::kKeyBlock + k % 4 * 32), k > 0);
    commit_products();
  }
  __device__ void start_out(uint32_t at) {
    const uint32_t stage = at % kStages;
    await(barriers.values_full[stage], at);
    begin_products();
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k)
      multiply_rows(Type{}, out, p[k], further(values, stage * kStage + k * 16 * kRowBytes), true);
    commit_products();
  }
  __device__ void free(Barrier (&empty)[kStages], uint32_t at) {
    if (lane == 0) arrive(empty[at % kStages]);
  }
  __device__ void narrow_scores() {
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k) narrow(Type{}, p[k], scores, k);
  }

  // All tiles to `last`, of keys from `key` on.
  __device__ void attend(RunningSoftmax& softmax, const ScoreScale& scale, const Sight& sight, uint32_t key,
                         uint32_t last) {
    float shrink[2];
    auto to_probabilities = [&] {
      const float factor = score(scores, scale, sight, key, lane);
      key += Keys;
      return softmax.add(scores, factor, shrink);
    };
#pragma unroll
    for (int n = 0; n < HeadDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
    start_scores(turn);
    wait_products<0>();
    pin(scores);
    free(barriers.keys_empty, turn);
    to_probabilities();
    narrow_scores();
    for (; turn < last; ++turn) {
      pin(scores);
      start_scores(turn + 1);
      pin(out);
      start_out(turn);
      wait_products<1>();
      pin(scores);
      free(barriers.keys_empty, turn + 1);
      const bool shrinks = to_probabilities();
      wait_products<0>();
      pin(out);
      free(barriers.values_empty, turn);
      if (shrinks) shrink_sums(out, shrink);
      narrow_scores();
    }
    pin(out);
    start_out(turn);
    wait_products<0>();
    pin(out);
    free(barriers.values_empty, turn++);
  }
  // Tiles that none of its queries sees.
  __device__ void pass_by(uint32_t end) {
    for (; turn < end; ++turn) {
      wait(barriers.keys_full[turn % kStages], turn / kStages % 2);
      free(barriers.keys_empty, turn);
      wait(barriers.values_full[turn % kStages], turn / kStages % 2);
      free(barriers.values_empty, turn);
    }
  }
};

template <class Type, int HeadDim, int Keys>
__device__ void consume(Type, const Prefill& args, Layout<HeadDim, Keys> shared, Barriers& barriers, int group) {
  const uint32_t before = threadIdx.x / 32 % 4 * 16;  // rows of the warps before
  const size_t stride = size_t{args.heads} * HeadDim;
  const Queries<Type, HeadDim, Keys> queries{shared, group};
  Consumer<Type, HeadDim, Keys> consumer(shared, barriers, group);
  Works works;
  PrefillWork work;
  bool more = works.next(args, HeadDim, work);
  if (more) queries.ask(args.q, Share(work, group), stride);
  while (more) {
    const Share share(work, group);
    const uint32_t kv_head = work.kv_head, first = work.first_tile(Keys);
    const uint32_t end = consumer.turn + work.tiles(first, work.end_key, Keys);
    const ScoreScale score_scale = args.score_of(kv_head);
    RunningSoftmax softmax;
    queries.await();
    if (share.rows > 0) {
      const uint32_t last = consumer.turn + work.tiles(first, share.position + share.rows, Keys) - 1;
      consumer.attend(softmax, score_scale, {share.position + before, args.window}, first, last);
    }
    more = works.next(args, HeadDim, work);
    if (more) queries.ask(args.q, Share(work, group), stride);  // they come while results go
    if (share.rows > 0)
      store_chunks<Chunks<Type, HeadDim>>(consumer.out, softmax, args.out_factor(kv_head), args.out,
                                          share.at + before * stride, stride,
                                          before < share.rows ? min(16u, share.rows - before) : 0, consumer.lane);
    consumer.pass_by(end);
  }
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
  if (threadIdx.x == 0)
    for (int stage = 0; stage < kStages; ++stage) {
      init(barriers.keys_full[stage], kGroup);
      init(barriers.values_full[stage], kGroup);
      init(barriers.keys_empty[stage], kConsumers * kGroup / 32);
      init(barriers.values_empty[stage], kConsumers * kGroup / 32);
    }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    shrink_registers<kProducerRegisters<Cache>>();
    produce<HeadDim, Keys>(Cache{}, args, shared, barriers);
  } else {
    grow_registers<kConsumerRegisters<Cache>>();
    const int group = __shfl_sync(~0u, threadIdx.x / kGroup, 0) - 1;  // known to be the same in a warp
    consume(typename CacheType<Cache>::Type{}, args, shared, barriers, group);
  }
#endif
}

// As few as give all multiprocessors two works or more, and hardly any of them one more than the others.
uint32_t section_heads(const Prefill& args, uint32_t multiprocessors) {
  for (uint32_t heads = args.heads / args.kv_heads; heads < args.heads; heads += args.heads / args.kv_heads) {
    const uint32_t works = args.tiles * heads, rounds = (works + multiprocessors - 1) / multiprocessors;
    if (args.heads % heads == 0 && rounds >= 2 && works * 10 >= rounds * multiprocessors * 9) return heads;
  }
  return args.heads;
}

template <int HeadDim, int Keys, class Cache>
bool launch(const Prefill& args, const DeviceInfo& device, const Stream& stream) {
  constexpr int kBytes = Layout<HeadDim, Keys>::kBytes;
  const auto kernel = prefill_kernel<HeadDim, Keys, Cache>;
  cudaFuncAttributes attributes;
  GEMMA_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.sharedSizeBytes == 0) return false;  // compiled without its body
  allow_shared(kernel, kBytes);
  Prefill dealt = args;
  dealt.section_heads = section_heads(args, device.multiprocessors);
  launch_early(stream, std::min<uint32_t>(args.heads * args.tiles, device.multiprocessors), kThreads, kBytes, kernel,
               dealt);
  return true;
}

template <int HeadDim, int Keys>
bool launch(const Prefill& args, const DeviceInfo& device, const Stream& stream) {
  return args.key_scales != nullptr ? launch<HeadDim, Keys, uint8_t>(args, device, stream)
                                    : launch<HeadDim, Keys, bf16_t>(args, device, stream);
}

}  // namespace

bool prefill_hopper(const Prefill& args, uint32_t head_dim, const DeviceInfo& device, const Stream& stream) {
  if (device.capability != 90) return false;
  if (head_dim == 128) return launch<128, 128>(args, device, stream);
  if (head_dim == 256) return launch<256, 64>(args, device, stream);
  return false;
}

}  // namespace gemma_cuda::cuda
