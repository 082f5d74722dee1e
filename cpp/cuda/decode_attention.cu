// Attention of sequences with one new token over their paged cache.
//
// What bounds it is the reading of K and V, each once, so every warp has about the same bytes to read: a stretch of the
// line of all tiles of 16 tokens, whole rows of it, or a stretch of a row of its block's own, as a plan has it that
// layers share (decode_plan.cuh). What the warps of a block find of its own row comes together in shared memory.
//
// A warp is on its own: it copies its next tiles into its ring in shared memory (cp.async, running ahead over the ends
// of rows), and takes them to the tensor cores: S^T = K Q^T and O^T = V^T P^T with the group's query heads as the eight
// columns of the product. No barrier but those of rows apart. Of a row each warp leaves a part of the result (maximum,
// sum, unnormalized output), and the last combines them in a fixed order, whichever warp that is; its own part it has
// at hand. No block waits for another.
//
// What earlier steps left in the cache is asked for before the kernel before has ended (launch.cuh); only the tile with
// the newest token has to wait for it. Code is kept short: every layer reads it anew.
//
// Reached alone, on an H100 that copies 3.01 TB/s, before 2026-11-26, for 64 sequences of 300, 512 and 960 tokens and
// 16 heads of 256: in bf16 2.86, 2.94 and 3.00 TB/s, in FP8 2.58, 2.72 and 2.84. In a step of gemma-7b in FP8 it adds,
// at 512 tokens, 92.2 us to what RoPE does, for 89.2 of bytes (benches/NOTES.md).
#include <algorithm>
#include <cmath>

#include "cuda/arrival.cuh"
#include "cuda/cache_policy.cuh"
#include "cuda/decode_plan.cuh"
#include "cuda/decode_tiles.cuh"
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/softmax.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kMaxWarps = 8;  // a block

template <int HeadDim, class Cache>
constexpr uint32_t stage_bytes = 2 * kTileTokens* HeadDim * sizeof(Cache);
// A multiprocessor asks for so many bytes at once. Where there are many rows, 128 KiB keep the memory as busy as 192,
// and what other kernels want of it waits less: 1.1 % of a step of 64 sequences in FP8, 0.3 % in bf16. Where there are
// few, a warp has hardly more tiles than it can ask for, and all are best asked for at once.
template <bool Many>
constexpr uint32_t most_asked = (Many ? 128 : 192) << 10;
// Of a warp's ring.
template <int HeadDim, class Cache, bool Many>
constexpr uint32_t stages = Many || stage_bytes<HeadDim, Cache> > 8192 ? 2 : 3;
template <int HeadDim, class Cache, bool Many>
constexpr uint32_t most_warps = std::min<uint32_t>(kMaxWarps, most_asked<Many> / (stages<HeadDim, Cache, Many> *
                                                                                  stage_bytes<HeadDim, Cache>));
template <int HeadDim>
constexpr int most_blocks = HeadDim > 128 ? 1 : 2;  // a multiprocessor

struct Decode {
  const bf16_t* q;
  const void* keys;  // bf16, or FP8 with scales
  const void* values;
  const float* key_scales;
  const float* value_scales;
  DecodeTables tables;
  const Stretch* stretches;
  const uint32_t* block_table;
  uint32_t max_pages, page_size, heads;
  uint32_t group, queries;  // a group's queries are shares of at most so many each
  ScoreScale score;
  AttentionOut out;
  float* partial;      // [2 stretches][queries][HeadDim]
  float2* weights;     // [2 stretches][queries]: maximum (log2 units) and sum
  uint32_t* arrivals;  // [stretches], of the row whose first part it has
};

// Queries of a row, and where the first one is among those of all tokens.
__device__ uint32_t queries(const Decode& args, const Row& row) {
  return min(args.queries, args.group - row.share * args.queries);
}
__device__ size_t first_query(const Decode& args, const Row& row) {
  return size_t{args.tables.cu_seqlens[row.sequence]} * args.heads + row.kv_head * args.group +
         row.share * args.queries;
}

// Walks a warp's tiles: a stretch of the line, or a part of one row.
struct Cursor {
  uint32_t at, end;             // tiles of the line, or of the row
  uint32_t row_begin, row_end;  // likewise
  Row row;
  float key_scale, value_scale;  // of the row, asked for as soon as it is known

  __device__ Cursor(const Decode& args, const Stretch& work)
      : at(work.at),
        end(work.end),
        row_begin(work.apart ? 0 : work.row.begin),
        row_end(work.apart ? work.row.tokens.tiles() : work.row.begin + work.row.count),
        row(work.row) {
    if (!done()) ask_scales(args);
  }
  __device__ bool done() const { return at >= end; }
  __device__ void next(const Decode& args) {
    if (++at != row_end || at >= end) return;
    row.next(args.tables);
    row_begin = row.begin;
    row_end = row.begin + row.count;
    ask_scales(args);
  }
  __device__ uint32_t first_token() const { return (row.tokens.first_tile() + at - row_begin) * kTileTokens; }
  // Whether the tile has the token of this step, the row's last.
  __device__ bool newest() const { return first_token() + kTileTokens >= row.tokens.end; }

 private:
  __device__ void ask_scales(const Decode& args) {
    key_scale = args.key_scales != nullptr ? args.key_scales[row.kv_head] : 1.0f;
    value_scale = args.value_scales != nullptr ? args.value_scales[row.kv_head] : 1.0f;
  }
};

// Starts the copies of a tile's K and V rows; tokens outside the range become zeros.
template <int HeadDim, class Cache>
__device__ void fetch(const Decode& args, const Cursor& cursor, uint32_t stage, int lane) {
  using Rows = typename CacheTile<HeadDim, Cache>::Rows;
  constexpr int kChunks = Rows::kChunks, kLanes = kChunks < 32 ? kChunks : 32;
  constexpr int kRows = 32 / kLanes < kTileTokens ? 32 / kLanes : kTileTokens;
  const Range tokens = cursor.row.tokens;
  const uint32_t first = cursor.first_token(), chunk = lane % kLanes;
  const uint32_t* pages = args.block_table + size_t{cursor.row.sequence} * args.max_pages;
  const auto row_of = [&](uint32_t token) {
    const uint64_t page = pages[token / args.page_size];
    return (page * args.tables.kv_heads + cursor.row.kv_head) * args.page_size + token % args.page_size;
  };
  const auto copy = [&](uint32_t at, uint64_t row) {
    const bool there = first + at >= tokens.first && first + at < tokens.end;
    const uint64_t offset = row * Rows::kRowBytes + chunk * 16;
    const uint32_t to = Rows::chunk(stage, at, chunk);
    stream_async(to, static_cast<const char*>(args.keys) + offset, there);
    stream_async(to + kTileTokens * Rows::kRowBytes, static_cast<const char*>(args.values) + offset, there);
  };
  if (lane >= kRows * kLanes) return;
  if (args.page_size % kTileTokens == 0) {  // a tile lies in one page
    const uint64_t row = row_of(first) + lane / kLanes;
#pragma unroll
    for (uint32_t i = 0; i < kTileTokens; i += kRows) copy(i + lane / kLanes, row + i);
  } else {
#pragma unroll 1
    for (uint32_t at = lane / kLanes; at < kTileTokens; at += kRows)
      copy(at, row_of(min(max(first + at, tokens.first), tokens.end - 1)));
  }
}

// The queries of a row as B fragments; columns past them are zero.
template <int HeadDim, class Cache>
__device__ void load_queries(const Decode& args, const Row& row, uint32_t (&q)[HeadDim / 16][2], int lane) {
  using Tile = CacheTile<HeadDim, Cache>;
  const uint32_t query = lane / 4;
  const bool there = query < queries(args, row);
  const bf16_t* from = args.q + (first_query(args, row) + query) * HeadDim;
#pragma unroll
  for (int k = 0; k < HeadDim / 16; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      q[k][i] =
          there ? Tile::Type::of_bf16(*reinterpret_cast<const uint32_t*>(from + Tile::query_column(k, i, lane))) : 0u;
}

// Running softmax of a row's queries over its tiles.
template <int HeadDim, class Cache>
struct State {
  using Tile = CacheTile<HeadDim, Cache>;
  ScoreScale score;
  float out[HeadDim / 16][4];
  float best[2], sum[2];  // of queries 2 (lane % 4) and the next; a lane's own share of the sum

  __device__ void clear(const Decode& args, float key_scale) {
    score = args.score;
    score.scale *= key_scale;
#pragma unroll
    for (auto& fragment : out) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
    best[0] = best[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  __device__ void add(const uint32_t (&q)[HeadDim / 16][2], uint32_t stage, uint32_t first_token, Range tokens,
                      int lane) {
    float scores[4] = {};
    Tile::multiply_keys(scores, q, stage, lane);
    if (score.cap > 0) cap(scores);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t token = first_token + Tile::token(half, lane);
      const bool seen = token >= tokens.first && token < tokens.end;
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i)
        scores[i] = seen ? score.cap > 0 ? scores[i] : scores[i] * score.scale : -INFINITY;
    }
    const float top[2] = {largest(fmaxf(scores[0], scores[2])), largest(fmaxf(scores[1], scores[3]))};
    if (__any_sync(~0u, top[0] > best[0] || top[1] > best[1])) raise(top);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i % 2] += scores[i] = fast_exp2(scores[i] - best[i % 2]);
    using Type = typename Tile::Type;
    const uint32_t p[2] = {transpose(Type::pack(scores[0], scores[1])), transpose(Type::pack(scores[2], scores[3]))};
    Tile::multiply_values(out, p, stage + kTileTokens * Tile::Rows::kRowBytes, lane);
  }

  __device__ void leave(float* sums, float2* weights, uint32_t queries, int lane) const {
    Tile::each_run(out, lane, [&](uint32_t query, int column, auto x) {
      if (query < queries) *reinterpret_cast<decltype(x)*>(sums + query * HeadDim + column) = x;
    });
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const float mass = total(sum[i]);
      const uint32_t query = lane % 4 * 2 + i;
      if (lane / 4 == 0 && query < queries) weights[query] = make_float2(best[i], mass);
    }
  }

 private:
  __device__ void cap(float (&scores)[4]) const {
#pragma unroll
    for (float& x : scores) x = score(x);
  }
  __device__ void raise(const float (&top)[2]) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float higher = fmaxf(best[i], top[i]);  // finite: every tile has a token in the range
      shrink[i] = fast_exp2(best[i] - higher);
      best[i] = higher;
      sum[i] *= shrink[i];
    }
#pragma unroll
    for (auto& fragment : out)
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] *= shrink[i % 2];
  }
  // Over the eight lanes of a query.
  __device__ static float largest(float x) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
    return x;
  }
  __device__ static float total(float x) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
  }
};

// What parts of a row come to, a lane's columns of it.
template <int HeadDim>
struct Weighed {
  static constexpr int kRuns = HeadDim < 128 ? 1 : HeadDim / 128;
  float best = -INFINITY, mass = 0;
  float4 sum[kRuns] = {};

  __device__ static bool within(int lane) { return lane < HeadDim / 4; }
  __device__ void write_out(const Decode& args, const Cursor& at, float out_factor, uint32_t query, int lane) const {
    const float factor = out_factor * at.value_scale / mass;
    const size_t to = (first_query(args, at.row) + query) * HeadDim + 4 * lane;
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
      if (within(lane)) args.out.store(to + 128 * run, sum[run] * factor);
  }
  __device__ void leave(float* sums, float2& weight, int lane) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
      if (within(lane)) reinterpret_cast<float4*>(sums)[lane + 32 * run] = sum[run];
    if (lane == 0) weight = make_float2(best, mass);
  }
  __device__ void add(float2 weight, const float4 (&part)[kRuns]) {
    const float top = fmaxf(best, weight.x), shrink = fast_exp2(best - top), grow = fast_exp2(weight.x - top);
    best = top;
    mass = mass * shrink + weight.y * grow;
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      sum[i].x = sum[i].x * shrink + part[i].x * grow, sum[i].y = sum[i].y * shrink + part[i].y * grow;
      sum[i].z = sum[i].z * shrink + part[i].z * grow, sum[i].w = sum[i].w * shrink + part[i].w * grow;
    }
  }
};

// Where the parts of a row are left, in their order, and how many have been. One of them, `mine`, is the caller's, who
// has it in shared memory.
struct Parts {
  float* sums;
  float2* weights;  // maximum (log2 units) and sum
  uint32_t* arrived;
  uint32_t count, queries;
  uint32_t stride;      // of sums, in floats
  uint32_t step = 1;    // from one part to the next
  bool second = false;  // whether the first one begins a place later
  uint32_t mine = 0;
  float* my_sums = nullptr;  // null: left with the others
  float2* my_weights = nullptr;

  __device__ uint32_t place(uint32_t part) const { return step * part + (part == 0 && second ? 1 : 0); }
  __device__ bool held(uint32_t part) const { return part == mine && my_sums != nullptr; }
  __device__ float* sums_of(uint32_t part) const { return sums + size_t{place(part)} * stride; }
  __device__ float2* weights_of(uint32_t part) const { return weights + place(part) * queries; }
  __device__ const float* read_sums(uint32_t part) const { return held(part) ? my_sums : sums_of(part); }
  __device__ const float2* read_weights(uint32_t part) const { return held(part) ? my_weights : weights_of(part); }

  // Whether all others have been left.
  __device__ bool others_there(int lane) const {
    if (count == 1) return true;
    uint32_t there = 0;
    if (lane == 0) {
      there = load_acquire(*arrived);
      if (there + 1 == count) *arrived = 0;
    }
    return __shfl_sync(~0u, there, 0) + 1 == count;
  }
  // Whether with one more part all are there. Whoever brings the last sets the count back for the next launch.
  __device__ bool complete(int lane) const {
    __syncwarp();  // every lane has written
    if (count == 1) return true;
    uint32_t before = 0;
    if (lane == 0) {
      before = add_acquire_release(*arrived);
      if (before + 1 == count) *arrived = 0;
    }
    return __shfl_sync(~0u, before, 0) + 1 == count;
  }
};

// Weighs the parts of a row in their order, whoever came last: they are all of it, or part `place` of others.
template <int HeadDim>
__device__ void combine(const Decode& args, const Cursor& at, float out_factor, const Parts& parts, bool all,
                        const Parts& others, uint32_t place, int lane) {
  using Mean = Weighed<HeadDim>;
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (uint32_t query = 0; query < queries(args, at.row); ++query) {
    Mean mean;
    for (uint32_t from = 0; from < parts.count; from += kAtOnce) {
      float2 weights[kAtOnce];
      float4 values[kAtOnce][Mean::kRuns];
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        const bool there = from + i < parts.count;
        weights[i] = there ? parts.read_weights(from + i)[query] : make_float2(-INFINITY, 0);
        const float4* part = reinterpret_cast<const float4*>(parts.read_sums(from + i) + query * HeadDim) + lane;
#pragma unroll
        for (int run = 0; run < Mean::kRuns; ++run)
          values[i][run] = there && Mean::within(lane) ? part[32 * run] : float4{};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) mean.add(weights[i], values[i]);
    }
    if (all)
      mean.write_out(args, at, out_factor, query, lane);
    else
      mean.leave(others.sums_of(place) + query * HeadDim, others.weights_of(place)[query], lane);
  }
}

// Places for parts in global memory, from this one on.
template <int HeadDim>
__device__ Parts global_parts(const Decode& args, uint32_t place, uint32_t arrival, uint32_t count) {
  return {.sums = args.partial + size_t{place} * args.queries * HeadDim,
          .weights = args.weights + place * args.queries,
          .arrived = args.arrivals + arrival,
          .count = count,
          .queries = args.queries,
          .stride = args.queries * HeadDim};
}

// Where the parts of the row at the cursor are left. Of a row that one block has, the rings have room for them: they
// are no longer used.
template <int HeadDim>
__device__ Parts parts_of(const Decode& args, const Stretch& work, const Cursor& at, char* rings, uint32_t ring_bytes,
                          float2* weights) {
  if (work.apart) {
    const uint32_t of_block = blockDim.x / 32 * work.length;
    const uint32_t left = min(of_block, at.row_end - work.block * of_block);
    return {.sums = reinterpret_cast<float*>(rings),
            .weights = weights,
            .arrived = nullptr,
            .count = (left + work.length - 1) / work.length,
            .queries = args.queries,
            .stride = ring_bytes / static_cast<uint32_t>(sizeof(float)),
            .mine = threadIdx.x / 32};
  }
  const uint32_t first = at.row_begin / work.length;
  Parts parts = global_parts<HeadDim>(args, 2 * first, first, (at.row_end - 1) / work.length - first + 1);
  parts.step = 2;  // a stretch may have the end of one row and the beginning of another
  parts.second = at.row_begin % work.length != 0;
  parts.mine = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32 - first;
  return parts;
}

// A barrier of the first warps of a block.
__device__ void meet(uint32_t warps) { asm volatile("barrier.cta.sync 1, %0;" ::"r"(32 * warps) : "memory"); }

// A part in shared memory to where others find it.
template <int HeadDim>
__device__ void publish(const Parts& parts, int lane) {
  float4* const to = reinterpret_cast<float4*>(parts.sums_of(parts.mine));
#pragma unroll 1
  for (uint32_t i = lane; i < parts.queries * HeadDim / 4; i += 32)
    to[i] = reinterpret_cast<const float4*>(parts.my_sums)[i];
  if (lane < parts.queries) parts.weights_of(parts.mine)[lane] = parts.my_weights[lane];
}

// The warp's part of the row at the cursor. Of a row that blocks have for themselves, the last of a block's warps
// combines the block's parts, and what they come to is one part, if other blocks have some too. Else whoever comes last
// combines them. That is mostly who has come to the end of its stretch, when the kernel ends: its own part then need
// not go to global memory, nor does it wait in a fence for all that it has asked for. `stage` is one that is no longer
// used.
template <int HeadDim, class Cache>
__device__ void finish(const State<HeadDim, Cache>& state, const Decode& args, const Stretch& work, const Cursor& at,
                       float out_factor, char* rings, uint32_t ring_bytes, char* stage, float2* weights, int lane) {
  Parts parts = parts_of<HeadDim>(args, work, at, rings, ring_bytes, weights);
  parts.my_sums = work.apart ? parts.sums_of(parts.mine) : reinterpret_cast<float*>(stage);
  parts.my_weights = weights + threadIdx.x / 32 * args.queries;
  state.leave(parts.my_sums, parts.my_weights, queries(args, at.row), lane);
  __syncwarp();
  uint32_t blocks = 1;
  bool complete;
  if (work.apart) {
    meet(parts.count);
    const uint32_t of_block = blockDim.x / 32 * work.length;
    blocks = (at.row_end + of_block - 1) / of_block;  // that have tiles of the row
    complete = parts.mine + 1 == parts.count;
  } else {
    // Whoever has the row's beginning has it at the end of his stretch, the others at the beginning: too early to ask.
    complete = (parts.count == 1 || at.at + 1 == at.end) && parts.others_there(lane);
    if (!complete) {
      publish<HeadDim>(parts, lane);
      complete = parts.complete(lane);
    }
  }
  for (bool all = blocks == 1; complete; all = true) {
    const Parts others = global_parts<HeadDim>(args, at.row.begin, at.row.begin, blocks);
    combine<HeadDim>(args, at, out_factor, parts, all, others, work.block, lane);
    if (all) break;
    parts = others;
    complete = parts.complete(lane);
  }
  __syncwarp();  // the stage may be used again
}

template <int HeadDim, class Cache, bool Many>
__global__ void __launch_bounds__(kMaxWarps * 32, most_blocks<HeadDim>) decode_kernel(Decode args) {
  extern __shared__ __align__(128) char rings[];
  __shared__ float2 weights[kMaxWarps * kTileQueries];
  constexpr uint32_t kStage = stage_bytes<HeadDim, Cache>, kStages = stages<HeadDim, Cache, Many>,
                     kRing = kStages * kStage;
  const int lane = threadIdx.x % 32;
  const uint32_t ring = shared_address(rings) + threadIdx.x / 32 * kRing;
  allow_next();
  Stretch work = args.stretches[blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32];
  if (Many) work.apart = false;  // as it is: so the code for it is left out
  Cursor here(args, work), ahead = here;
  if (here.done()) return wait_for_last();  // whoever waits for this kernel waits for those before it

  uint32_t q[HeadDim / 16][2];
  State<HeadDim, Cache> state;
  const float out_factor = args.out.factor();
  uint32_t piece = here.at;  // where this warp's part of the row begins
  bool early = true;
  const auto wait_once = [&] {
    if (early) wait_for_last();
    early = false;
  };
#pragma unroll 1
  for (int turn = -static_cast<int>(kStages); !here.done(); ++turn) {  // the ring is filled first
    const uint32_t stage = ring + (turn + kStages) % kStages * kStage;
    if (turn >= 0) {
      wait_once();
      if (here.at == piece) {
        load_queries<HeadDim, Cache>(args, here.row, q, lane);
        state.clear(args, here.key_scale);
      }
      wait_copies<kStages - 1>();
      __syncwarp();  // every lane's copies are there
      state.add(q, stage, here.first_token(), here.row.tokens, lane);
      __syncwarp();  // nobody reads the stage any more
      if (here.at + 1 == here.row_end || here.at + 1 == here.end) {
        finish(state, args, work, here, out_factor, rings, kRing, rings + (stage - shared_address(rings)), weights,
               lane);
        piece = here.at + 1;
      }
      here.next(args);
    }
    if (!ahead.done()) {
      if (ahead.newest()) wait_once();
      fetch<HeadDim, Cache>(args, ahead, stage, lane);
      ahead.next(args);
    }
    commit_copies();
  }
}

constexpr int kStaticShared = 1024;  // bytes that decode_kernel has besides, at most

int most_shared(const DeviceInfo& device) { return device.shared_memory - kStaticShared; }

struct Launch {
  void (*kernel)(Decode);
  DecodeGrid grid;
  size_t shared;
};

template <int HeadDim, class Cache, bool Many>
Launch launch_of(const DeviceInfo& device) {
  const size_t most = most_shared(device);
  constexpr size_t kWarpBytes = stages<HeadDim, Cache, Many> * stage_bytes<HeadDim, Cache>;
  uint32_t warps = most_warps<HeadDim, Cache, Many>;
  while (warps > 1 && warps * kWarpBytes > most) --warps;
  const size_t shared = warps * kWarpBytes;
  const uint32_t blocks = device.multiprocessors * (2 * (shared + 2048) <= most ? most_blocks<HeadDim> : 1);
  return {decode_kernel<HeadDim, Cache, Many>, {blocks, warps, stages<HeadDim, Cache, Many>, Many}, shared};
}

template <int HeadDim>
Launch launch_of(const DecodeTables& tables, bool fp8, const DeviceInfo& device) {
  const bool many = tables.sequences * tables.kv_heads * tables.shares >
                    static_cast<uint32_t>(device.multiprocessors * most_blocks<HeadDim>);
  if (fp8) return many ? launch_of<HeadDim, uint8_t, true>(device) : launch_of<HeadDim, uint8_t, false>(device);
  return many ? launch_of<HeadDim, bf16_t, true>(device) : launch_of<HeadDim, bf16_t, false>(device);
}

Launch launch_of(const AttentionArgs& args, const DecodeTables& tables, const DeviceInfo& device) {
  const bool fp8 = args.cache.key_scales != nullptr;
  switch (args.cache.head_dim) {
    case 16: return launch_of<16>(tables, fp8, device);
    case 32: return launch_of<32>(tables, fp8, device);
    case 64: return launch_of<64>(tables, fp8, device);
    case 128: return launch_of<128>(tables, fp8, device);
    case 256: return launch_of<256>(tables, fp8, device);
    default: throw Error::invalid_argument("head_dim " + std::to_string(args.cache.head_dim) + " has no CUDA kernel");
  }
}

uint32_t group(const AttentionArgs& args) { return args.heads / args.cache.kv_heads; }

DecodeTables tables_of(const AttentionArgs& args) {
  return {.cu_seqlens = args.cu_seqlens,
          .kv_len = args.kv_len,
          .sequences = args.sequences,
          .kv_heads = args.cache.kv_heads,
          .window = args.window,
          .shares = (group(args) + kTileQueries - 1) / kTileQueries};
}

size_t most_stretches(const DeviceInfo& device, uint32_t head_dim) {
  return size_t{kMaxWarps} * device.multiprocessors * (head_dim > 128 ? most_blocks<256> : most_blocks<128>);
}
// Of any head, so that the memory for a wide one is enough for a narrow one.
size_t weight_count(const DeviceInfo& device, uint32_t group) { return 2 * most_stretches(device, 1) * group; }

}  // namespace

size_t decode_scratch_bytes(const DeviceInfo& device, uint32_t head_dim, uint32_t group) {
  return weight_count(device, group) * sizeof(float2) +
         2 * most_stretches(device, head_dim) * group * head_dim * sizeof(float);
}

size_t decode_arrival_bytes(const DeviceInfo& device) { return most_stretches(device, 1) * sizeof(uint32_t); }

size_t decode_plan_bytes(const DeviceInfo& device) { return most_stretches(device, 1) * sizeof(Stretch); }

void plan_decode_attention(const AttentionArgs& args, const DeviceInfo& device, void* plan, const Stream& stream) {
  const DecodeTables tables = tables_of(args);
  plan_decode(tables, launch_of(args, tables, device).grid, most_shared(device), static_cast<Stretch*>(plan), stream);
}

void decode_attention(const AttentionArgs& args, const DeviceInfo& device, const void* plan, void* scratch,
                      uint32_t* arrivals, const Stream& stream) {
  const DecodeTables tables = tables_of(args);
  float2* weights = static_cast<float2*>(scratch);
  const Decode decode{.q = static_cast<const bf16_t*>(args.q),
                      .keys = args.cache.keys,
                      .values = args.cache.values,
                      .key_scales = args.cache.key_scales,
                      .value_scales = args.cache.value_scales,
                      .tables = tables,
                      .stretches = static_cast<const Stretch*>(plan),
                      .block_table = args.block_table,
                      .max_pages = args.max_pages,
                      .page_size = args.cache.page_size,
                      .heads = args.heads,
                      .group = group(args),
                      .queries = (group(args) + tables.shares - 1) / tables.shares,
                      .score = ScoreScale::of(args.scale, args.soft_cap),
                      .out = {args.out, args.quantize.scale},
                      .partial = reinterpret_cast<float*>(weights + weight_count(device, group(args))),
                      .weights = weights,
                      .arrivals = arrivals};
  const Launch launch = launch_of(args, tables, device);
  allow_shared(launch.kernel, most_shared(device));
  launch_early(stream, launch.grid.blocks, launch.grid.warps * 32, launch.shared, launch.kernel, decode);
}

}  // namespace gemma_cuda::cuda
