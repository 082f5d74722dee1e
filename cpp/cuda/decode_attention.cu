// Attention of sequences with one new token over their paged cache.
//
// What bounds it is the reading of K and V, each once, so the work is cut by bytes: every (sequence, K/V head) is a row
// of tiles of 16 tokens, all rows laid end to end make one line, and the line is cut into equal stretches, one a warp,
// wherever the cuts fall. Lengths, however different, need no other balancing. Where there are fewer rows than blocks,
// each has some blocks of its own, whose warps have even shares of it: what they find comes together in shared memory.
// Lengths are read on the device, so that a captured launch replays with any; a sequence with any other number of new
// tokens has no tiles here.
//
// A warp is on its own: it copies its next tiles into its ring in shared memory (cp.async, running ahead over the ends
// of rows), and takes them to the tensor cores: S^T = K Q^T and O^T = V^T P^T with the group's query heads as the eight
// columns of the product. A group of more is several rows, which read the same tiles. No barrier but the one after the
// geometry is computed and those of rows apart. Of a row each warp leaves a part of the result (maximum, sum,
// unnormalized output), and the last combines them in a fixed order, whichever warp that is; its own part it has at
// hand. No block waits for another.
//
// What earlier steps left in the cache is asked for before the kernel before has ended (launch.cuh); only the tile with
// the newest token has to wait for it. Code is kept short: every layer reads it anew.
//
// Reaches, on an H100 that copies 3.01 TB/s, for 64 sequences of 300, 512 and 960 tokens and 16 heads of 256: in
// bf16 2.86, 2.94 and 3.00 TB/s, in FP8 2.58, 2.72 and 2.84.
#include <algorithm>
#include <cmath>

#include "cuda/arrival.cuh"
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
  const uint32_t* cu_seqlens;
  const uint32_t* kv_len;
  const uint32_t* block_table;
  uint32_t sequences, max_pages, page_size, heads, kv_heads, window;
  uint32_t group, shares, queries;  // a group's queries are so many rows, of at most so many queries each
  ScoreScale score;
  AttentionOut out;
  float* partial;      // [2 stretches][queries][HeadDim]
  float2* weights;     // [2 stretches][queries]: maximum (log2 units) and sum
  uint32_t* arrivals;  // [stretches], of the row whose first part it has
  uint32_t stretches;
};

// Rows of a sequence.
__device__ uint32_t rows(const Decode& args) { return args.kv_heads * args.shares; }

struct Range {  // of the tokens a sequence's new token sees
  uint32_t first, end;
  __device__ uint32_t first_tile() const { return first / kTileTokens; }
  __device__ uint32_t tiles() const { return (end + kTileTokens - 1) / kTileTokens - first_tile(); }
};

__device__ Range range(const Decode& args, uint32_t sequence) {
  if (args.cu_seqlens[sequence + 1] - args.cu_seqlens[sequence] != 1) return {0, 0};
  const uint32_t end = args.kv_len[sequence];
  return {args.window != 0 && end > args.window ? end - args.window : 0, end};
}

// The most tiles of a row for a block if every row has blocks of its own. 0 where there are not blocks enough for that,
// or some would have over a tile a warp more than an even share.
__device__ uint32_t tiles_a_block(const Decode& args, uint32_t least) {
  if (args.sequences * rows(args) > gridDim.x) return 0;
  const uint32_t warps = blockDim.x / 32, lane = threadIdx.x % 32;
  uint32_t tiles = 0;
#pragma unroll 1
  for (uint32_t sequence = lane; sequence < args.sequences; sequence += 32) tiles += range(args, sequence).tiles();
  tiles = __reduce_add_sync(~0u, tiles) * rows(args);
  const uint32_t even = max(least * warps, (tiles + gridDim.x - 1) / gridDim.x);
  for (uint32_t most = even; most <= even + warps; most += (warps + 1) / 2) {
    uint32_t blocks = 0;
#pragma unroll 1
    for (uint32_t sequence = lane; sequence < args.sequences; sequence += 32)
      blocks += (range(args, sequence).tiles() + most - 1) / most;
    if (__reduce_add_sync(~0u, blocks) * rows(args) <= gridDim.x) return most;
  }
  return 0;
}

// Prefix sums over the sequences into `before`, [sequences + 1], by the whole block: of the tiles of a row, or, if a
// block takes at most so many of one, of its blocks.
__device__ void lay_out(const Decode& args, uint32_t most, uint32_t* before) {
  __shared__ uint32_t sums[32];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t total = 0;
#pragma unroll 1
  for (uint32_t base = 0; base < args.sequences; base += blockDim.x) {
    const uint32_t sequence = base + threadIdx.x;
    uint32_t sum = sequence < args.sequences ? range(args, sequence).tiles() : 0;
    if (most != 0) sum = (sum + most - 1) / most;
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t left = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += left;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    const uint32_t of_warp = lane < warps ? sums[lane] : 0;
    sum += __reduce_add_sync(~0u, lane < warp ? of_warp : 0);
    if (sequence < args.sequences) before[sequence + 1] = total + sum;
    total += __reduce_add_sync(~0u, of_warp);
  }
  if (threadIdx.x == 0) before[0] = 0;
  __syncthreads();
}

// A row, and where in the line of all rows' tiles, or blocks, its own are.
struct Row {
  uint32_t sequence, kv_head, share;  // the share of the group's queries that the row is of
  uint32_t begin, count;
  Range tokens;
  float key_scale, value_scale;  // asked for as soon as the row is found

  // The one that has number `at` of the line.
  __device__ void find(const Decode& args, const uint32_t* before, uint32_t at) {
    uint32_t low = 0, high = args.sequences;  // before[low] * rows <= at < before[high] * rows
#pragma unroll 1
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (before[middle] * rows(args) <= at ? low : high) = middle;
    }
    enter(args, before, low);
    begin = before[low] * rows(args);
    const uint32_t row = (at - begin) / count;
    begin += row * count;
    kv_head = row / args.shares;
    share = row - kv_head * args.shares;
    ask_scales(args);
  }
  // The next of the line: there is one.
  __device__ void next(const Decode& args, const uint32_t* before) {
    begin += count;
    if (++share < args.shares) return;
    share = 0;
    if (++kv_head == args.kv_heads) {
      kv_head = 0;
      uint32_t other = sequence + 1;
#pragma unroll 1
      while (before[other + 1] == before[other]) ++other;
      enter(args, before, other);
    }
    ask_scales(args);
  }
  __device__ uint32_t queries(const Decode& args) const { return min(args.queries, args.group - share * args.queries); }
  // Where its first query is among those of all tokens.
  __device__ size_t first(const Decode& args) const {
    return size_t{args.cu_seqlens[sequence]} * args.heads + kv_head * args.group + share * args.queries;
  }

 private:
  __device__ void enter(const Decode& args, const uint32_t* before, uint32_t which) {
    sequence = which;
    count = before[which + 1] - before[which];
    tokens = range(args, which);
  }
  __device__ void ask_scales(const Decode& args) {
    key_scale = args.key_scales != nullptr ? args.key_scales[kv_head] : 1.0f;
    value_scale = args.value_scales != nullptr ? args.value_scales[kv_head] : 1.0f;
  }
};

// Walks a warp's tiles: a stretch of the line, or a part of one row.
struct Cursor {
  uint32_t at = 0, end = 0;  // tiles of the line, or of the row
  uint32_t row_begin = 0, row_end = 0;
  Row row;

  __device__ bool done() const { return at >= end; }
  __device__ void find(const Decode& args, const uint32_t* before) {
    row.find(args, before, at);
    enter();
  }
  __device__ void next(const Decode& args, const uint32_t* before) {
    if (++at != row_end || at >= end) return;
    row.next(args, before);
    enter();
  }
  __device__ uint32_t first_token() const { return (row.tokens.first_tile() + at - row_begin) * kTileTokens; }
  // Whether the tile has the token of this step, the row's last.
  __device__ bool newest() const { return first_token() + kTileTokens >= row.tokens.end; }

 private:
  __device__ void enter() {
    row_begin = row.begin;
    row_end = row.begin + row.count;
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
    return (page * args.kv_heads + cursor.row.kv_head) * args.page_size + token % args.page_size;
  };
  const auto copy = [&](uint32_t at, uint64_t row) {
    const bool there = first + at >= tokens.first && first + at < tokens.end;
    const uint64_t offset = row * Rows::kRowBytes + chunk * 16;
    const uint32_t to = Rows::chunk(stage, at, chunk);
    copy_async(to, static_cast<const char*>(args.keys) + offset, there);
    copy_async(to + kTileTokens * Rows::kRowBytes, static_cast<const char*>(args.values) + offset, there);
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
  const bool there = query < row.queries(args);
  const bf16_t* from = args.q + (row.first(args) + query) * HeadDim;
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

  __device__ void clear(const Decode& args, const Row& row) {
    score = args.score;
    score.scale *= row.key_scale;
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
  __device__ void write_out(const Decode& args, const Row& row, float out_factor, uint32_t query, int lane) const {
    const float factor = out_factor * row.value_scale / mass;
    const size_t to = (row.first(args) + query) * HeadDim + 4 * lane;
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
__device__ void combine(const Decode& args, const Row& row, float out_factor, const Parts& parts, bool all,
                        const Parts& others, uint32_t place, int lane) {
  using Mean = Weighed<HeadDim>;
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (uint32_t query = 0; query < row.queries(args); ++query) {
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
      mean.write_out(args, row, out_factor, query, lane);
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

// What a warp has to do.
struct Work {
  bool apart;               // whether rows have blocks of their own, which many never have
  uint32_t warps, stretch;  // of a block; number of this warp among those of all
  uint32_t length, block;   // tiles a warp; apart: number of this block among the row's
  Cursor tiles;

  __device__ Work(const Decode& args, bool many, uint32_t least, uint32_t* before)
      : warps(blockDim.x / 32), stretch(blockIdx.x * warps + threadIdx.x / 32), length(0), block(0) {
    const uint32_t most = many ? 0 : tiles_a_block(args, least);
    apart = most != 0;
    lay_out(args, most, before);
    const uint32_t all = before[args.sequences] * rows(args);
    if (!apart) {
      length = max((all + args.stretches - 1) / args.stretches, least);
      tiles.at = min(all, stretch * length);
      tiles.end = min(all, tiles.at + length);
      if (!tiles.done()) tiles.find(args, before);
    } else if (blockIdx.x < all) {
      tiles.row.find(args, before, blockIdx.x);
      tiles.row_end = tiles.row.tokens.tiles();
      block = blockIdx.x - tiles.row.begin;
      length = (tiles.row_end + tiles.row.count * warps - 1) / (tiles.row.count * warps);
      tiles.at = min(tiles.row_end, (block * warps + threadIdx.x / 32) * length);
      tiles.end = min(tiles.row_end, tiles.at + length);
    }
  }
  // Of a row that the warp has tiles of: blocks that have some, where it has its own.
  __device__ uint32_t blocks(const Cursor& at) const { return (at.row_end + warps * length - 1) / (warps * length); }
};

// Where the parts of the row at the cursor are left. Of a row that one block has, the rings have room for them: they
// are no longer used.
template <int HeadDim>
__device__ Parts parts_of(const Decode& args, const Work& work, const Cursor& at, char* rings, uint32_t ring_bytes,
                          float2* weights) {
  if (work.apart) {
    const uint32_t left = min(work.warps * work.length, at.row_end - work.block * work.warps * work.length);
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
  parts.mine = work.stretch - first;
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
__device__ void finish(const State<HeadDim, Cache>& state, const Decode& args, const Work& work, const Cursor& at,
                       float out_factor, char* rings, uint32_t ring_bytes, char* stage, float2* weights, int lane) {
  Parts parts = parts_of<HeadDim>(args, work, at, rings, ring_bytes, weights);
  parts.my_sums = work.apart ? parts.sums_of(parts.mine) : reinterpret_cast<float*>(stage);
  parts.my_weights = weights + threadIdx.x / 32 * args.queries;
  state.leave(parts.my_sums, parts.my_weights, at.row.queries(args), lane);
  __syncwarp();
  uint32_t blocks = 1;
  bool complete;
  if (work.apart) {
    meet(parts.count);
    blocks = work.blocks(at);
    complete = parts.mine + 1 == parts.count;
  } else {
    complete = parts.others_there(lane);
    if (!complete) {
      publish<HeadDim>(parts, lane);
      complete = parts.complete(lane);
    }
  }
  for (bool all = blocks == 1; complete; all = true) {
    const Parts others = global_parts<HeadDim>(args, at.row.begin, at.row.begin, blocks);
    combine<HeadDim>(args, at.row, out_factor, parts, all, others, work.block, lane);
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
  uint32_t* before = reinterpret_cast<uint32_t*>(rings + blockDim.x / 32 * kRing);
  allow_next();
  const Work work(args, Many, kStages, before);   // reads tables only, which are older than the kernel before
  if (work.tiles.done()) return wait_for_last();  // whoever waits for this kernel waits for those before it

  Cursor here = work.tiles, ahead = here;
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
        state.clear(args, here.row);
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
      here.next(args, before);
    }
    if (!ahead.done()) {
      if (ahead.newest()) wait_once();
      fetch<HeadDim, Cache>(args, ahead, stage, lane);
      ahead.next(args, before);
    }
    commit_copies();
  }
}

constexpr int kStaticShared = 1024;  // bytes that decode_kernel has besides, at most

template <int HeadDim, class Cache, bool Many>
void launch(Decode args, const DeviceInfo& device, const Stream& stream) {
  const size_t geometry = (args.sequences + 1) * sizeof(uint32_t), most = device.shared_memory - kStaticShared;
  constexpr size_t kWarpBytes = stages<HeadDim, Cache, Many> * stage_bytes<HeadDim, Cache>;
  uint32_t warps = most_warps<HeadDim, Cache, Many>;
  while (warps > 1 && warps * kWarpBytes + geometry > most) --warps;
  const size_t shared = warps * kWarpBytes + geometry;
  const uint32_t blocks = device.multiprocessors * (2 * (shared + 2048) <= most ? most_blocks<HeadDim> : 1);
  args.stretches = blocks * warps;
  allow_shared(decode_kernel<HeadDim, Cache, Many>, most);
  launch_early(stream, blocks, warps * 32, shared, decode_kernel<HeadDim, Cache, Many>, args);
}

template <int HeadDim, class Cache>
void launch(const Decode& args, const DeviceInfo& device, const Stream& stream) {
  const bool many = args.sequences * args.kv_heads * args.shares >
                    static_cast<uint32_t>(device.multiprocessors * most_blocks<HeadDim>);
  many ? launch<HeadDim, Cache, true>(args, device, stream) : launch<HeadDim, Cache, false>(args, device, stream);
}

template <int HeadDim>
void launch(const Decode& args, const DeviceInfo& device, const Stream& stream) {
  args.key_scales != nullptr ? launch<HeadDim, uint8_t>(args, device, stream)
                             : launch<HeadDim, bf16_t>(args, device, stream);
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

void decode_attention(const AttentionArgs& args, const DeviceInfo& device, void* scratch, uint32_t* arrivals,
                      const Stream& stream) {
  const uint32_t group = args.heads / args.cache.kv_heads, shares = (group + kTileQueries - 1) / kTileQueries;
  float2* weights = static_cast<float2*>(scratch);
  const Decode decode{.q = static_cast<const bf16_t*>(args.q),
                      .keys = args.cache.keys,
                      .values = args.cache.values,
                      .key_scales = args.cache.key_scales,
                      .value_scales = args.cache.value_scales,
                      .cu_seqlens = args.cu_seqlens,
                      .kv_len = args.kv_len,
                      .block_table = args.block_table,
                      .sequences = args.sequences,
                      .max_pages = args.max_pages,
                      .page_size = args.cache.page_size,
                      .heads = args.heads,
                      .kv_heads = args.cache.kv_heads,
                      .window = args.window,
                      .group = group,
                      .shares = shares,
                      .queries = (group + shares - 1) / shares,
                      .score = ScoreScale::of(args.scale, args.soft_cap),
                      .out = {args.out, args.quantize.scale},
                      .partial = reinterpret_cast<float*>(weights + weight_count(device, group)),
                      .weights = weights,
                      .arrivals = arrivals,
                      .stretches = 0};
  switch (args.cache.head_dim) {
    case 16: return launch<16>(decode, device, stream);
    case 32: return launch<32>(decode, device, stream);
    case 64: return launch<64>(decode, device, stream);
    case 128: return launch<128>(decode, device, stream);
    case 256: return launch<256>(decode, device, stream);
    default: throw Error::invalid_argument("head_dim " + std::to_string(args.cache.head_dim) + " has no CUDA kernel");
  }
}

}  // namespace gemma_cuda::cuda
