// Attention of sequences with one new token over their paged cache.
//
// What bounds it is the reading of K and V, each once, so the work is cut by bytes: every (sequence, K/V head) is a row
// of tiles of 16 tokens, all rows laid end to end make one line, and the line is cut into equal stretches, one a warp,
// wherever the cuts fall. Lengths, however different, need no other balancing. They are read on the device, so that a
// captured launch replays with any lengths; a sequence with any other number of new tokens has no tiles here.
//
// A warp is on its own: it copies its next tiles into its ring in shared memory (cp.async, running ahead over the ends
// of rows), and takes them to the tensor cores: S^T = K Q^T and O^T = V^T P^T with the group's query heads as the eight
// columns of the product. A group of more is several rows, which read the same tiles. No barrier but the one after the
// geometry is computed. A row that lies in one stretch is written out; of a row that is cut each stretch leaves a
// partial result (maximum, sum, unnormalized output), and a second kernel combines them in a fixed order.
//
// What earlier steps left in the cache is asked for before the kernel before has ended (launch.cuh); only the tile with
// the newest token has to wait for it.
//
// Reaches, on an H100 that copies 3.01 TB/s, for 64 sequences of 300, 512 and 960 tokens and 16 heads of 256: in
// bf16 2.75, 2.86 and 2.94 TB/s, in FP8 2.44, 2.66 and 2.79. What lacks is a fixed 10 us: finding the work, and
// combining.
#include <algorithm>
#include <cmath>

#include "cuda/decode_tiles.cuh"
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/softmax.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr int kStages = 3;
constexpr int kMaxWarps = 4;         // a block
constexpr uint32_t kLeastTiles = 2;  // in a stretch: shorter ones cost more to combine than they save

template <int HeadDim, class Cache>
constexpr uint32_t stage_bytes = 2 * kTileTokens* HeadDim * sizeof(Cache);

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
  uint32_t shares, queries;  // a group's queries are so many rows, of at most so many queries each
  ScoreScale score;
  AttentionOut out;
  float* partial;   // [2 stretches][queries][HeadDim]
  float2* weights;  // [2 stretches][queries]: maximum (log2 units) and sum
  uint32_t stretches;
};

// What a head's results are multiplied by on their way out.
__device__ float out_factor(const Decode& args, uint32_t head) {
  return args.out.factor() * (args.value_scales != nullptr ? args.value_scales[head] : 1.0f);
}

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

// Prefix sums of the sequences' tiles (of one head) into `before`, [sequences + 1], by the whole block.
__device__ void lay_out(const Decode& args, uint32_t* before) {
  __shared__ uint32_t sums[32];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t total = 0;
  for (uint32_t base = 0; base < args.sequences; base += blockDim.x) {
    const uint32_t sequence = base + threadIdx.x;
    uint32_t sum = sequence < args.sequences ? range(args, sequence).tiles() : 0;
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t left = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += left;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    for (uint32_t w = 0; w < warp; ++w) sum += sums[w];
    if (sequence < args.sequences) before[sequence + 1] = total + sum;
    __syncthreads();
    for (uint32_t w = 0; w < warps; ++w) total += sums[w];
  }
  if (threadIdx.x == 0) before[0] = 0;
  __syncthreads();
}

__device__ uint32_t stretch_length(uint32_t tiles, uint32_t stretches) {
  return max((tiles + stretches - 1) / stretches, kLeastTiles);
}

// Walks a stretch of the line tile by tile.
struct Cursor {
  uint32_t at, end;  // tiles of the line
  uint32_t sequence, kv_head;
  uint32_t query, queries;      // the first of its heads that the row is of, and how many there are
  uint32_t row_begin, row_end;  // tiles of the line
  Range tokens;

  __device__ bool done() const { return at >= end; }
  // The row that tile `at` lies in.
  __device__ void find(const Decode& args, const uint32_t* before) {
    uint32_t low = 0, high = args.sequences;  // before[low] * rows <= at < before[high] * rows
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (before[middle] * rows(args) <= at ? low : high) = middle;
    }
    const uint32_t tiles = before[low + 1] - before[low];
    const uint32_t begin = before[low] * rows(args);
    sequence = low;
    const uint32_t row = (at - begin) / tiles, group = args.heads / args.kv_heads;
    const uint32_t share = row % args.shares * args.queries;
    kv_head = row / args.shares;
    query = kv_head * group + share;
    queries = min(args.queries, group - share);
    row_begin = begin + row * tiles;
    row_end = row_begin + tiles;
    tokens = range(args, sequence);
  }
  __device__ void next(const Decode& args, const uint32_t* before) {
    if (++at == row_end && at < end) find(args, before);
  }
  // Where the row's first query is among those of all tokens.
  __device__ size_t first_row(const Decode& args) const {
    return size_t{args.cu_seqlens[sequence]} * args.heads + query;
  }
  __device__ uint32_t first_token() const { return (tokens.first_tile() + at - row_begin) * kTileTokens; }
  // Whether the tile has the token of this step, the row's last.
  __device__ bool newest() const { return first_token() + kTileTokens >= tokens.end; }
};

// Starts the copies of a tile's K and V rows; tokens outside the range become zeros.
template <int HeadDim, class Cache>
__device__ void fetch(const Decode& args, const Cursor& cursor, uint32_t stage, int lane) {
  using Rows = typename CacheTile<HeadDim, Cache>::Rows;
  constexpr int kChunks = Rows::kChunks, kLanes = kChunks < 32 ? kChunks : 32, kRows = 32 / kLanes;
  const uint32_t token = cursor.first_token() + lane % kTileTokens;
  const bool there = token >= cursor.tokens.first && token < cursor.tokens.end;
  const uint32_t page = there ? args.block_table[size_t{cursor.sequence} * args.max_pages + token / args.page_size] : 0;
  const uint64_t row = (uint64_t{page} * args.kv_heads + cursor.kv_head) * args.page_size + token % args.page_size;
  const int64_t mine = there ? static_cast<int64_t>(row * Rows::kRowBytes) : -1;
#pragma unroll
  for (int i = 0; i < kTileTokens; i += kRows) {
    const int at = i + lane / kLanes, chunk = lane % kLanes;
    const int64_t from = __shfl_sync(~0u, mine, at);
    if (kRows > kTileTokens && at >= kTileTokens) break;
    const size_t offset = (from < 0 ? 0 : from) + chunk * 16;
    const uint32_t to = Rows::chunk(stage, at, chunk);
    copy_async(to, static_cast<const char*>(args.keys) + offset, from >= 0);
    copy_async(to + kTileTokens * Rows::kRowBytes, static_cast<const char*>(args.values) + offset, from >= 0);
  }
}

// The queries of a row as B fragments; columns past them are zero.
template <int HeadDim, class Cache>
__device__ void load_queries(const Decode& args, const Cursor& cursor, uint32_t (&q)[HeadDim / 16][2], int lane) {
  using Tile = CacheTile<HeadDim, Cache>;
  const uint32_t query = lane / 4;
  const bool there = query < cursor.queries;
  const bf16_t* from = args.q + (cursor.first_row(args) + query) * HeadDim;
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

  __device__ void clear(const Decode& args, uint32_t head) {
    score = args.score;
    if (args.key_scales != nullptr) score.scale *= args.key_scales[head];
#pragma unroll
    for (auto& fragment : out) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
    best[0] = best[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  __device__ void add(const uint32_t (&q)[HeadDim / 16][2], uint32_t stage, uint32_t first_token, Range tokens,
                      int lane) {
    float scores[4] = {};
    Tile::multiply_keys(scores, q, stage, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t token = first_token + Tile::token(half, lane);
      const bool seen = token >= tokens.first && token < tokens.end;
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) scores[i] = seen ? score(scores[i]) : -INFINITY;
    }
    const float top[2] = {largest(fmaxf(scores[0], scores[2])), largest(fmaxf(scores[1], scores[3]))};
    if (__any_sync(~0u, top[0] > best[0] || top[1] > best[1])) raise(top);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i % 2] += scores[i] = fast_exp2(scores[i] - best[i % 2]);
    using Type = typename Tile::Type;
    const uint32_t p[2] = {transpose(Type::pack(scores[0], scores[1])), transpose(Type::pack(scores[2], scores[3]))};
    Tile::multiply_values(out, p, stage + kTileTokens * Tile::Rows::kRowBytes, lane);
  }

  // A row's results are divided by its mass, a part of it is left for the combination.
  __device__ void finish(const Decode& args, const Cursor& cursor, bool whole, uint32_t slot, int lane) {
    const int queries = cursor.queries;
    float mass[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) mass[i] = total(sum[i]);
    if (whole) {
      const size_t to = cursor.first_row(args);
      const float all = out_factor(args, cursor.kv_head);
      const float factor[2] = {all / mass[0], all / mass[1]};
      Tile::each_run(out, lane, [&](int query, int column, auto x) {
        if (query < queries)
          args.out.store((to + query) * HeadDim + column, x * (query % 2 == 0 ? factor[0] : factor[1]));
      });
    } else {
      Tile::each_run(out, lane, [&](int query, int column, auto x) {
        float* to = args.partial + (size_t{slot} * args.queries + query) * HeadDim + column;
        if (query < queries) *reinterpret_cast<decltype(x)*>(to) = x;
      });
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (lane / 4 == i && lane % 4 * 2 + i < queries)
          args.weights[size_t{slot} * args.queries + lane % 4 * 2 + i] = make_float2(best[i], mass[i]);
    }
  }

 private:
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

template <int HeadDim, class Cache>
__global__ void __launch_bounds__(kMaxWarps * 32) decode_kernel(Decode args) {
  extern __shared__ __align__(128) char memory[];
  constexpr uint32_t kStage = stage_bytes<HeadDim, Cache>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t ring = shared_address(memory) + warp * kStages * kStage;
  uint32_t* before = reinterpret_cast<uint32_t*>(memory + warps * kStages * kStage);
  allow_next();
  lay_out(args, before);  // reads tables only, which are older than the kernel before

  const uint32_t tiles = before[args.sequences] * rows(args), stretch = blockIdx.x * warps + warp;
  const uint32_t length = stretch_length(tiles, args.stretches), begin = min(tiles, stretch * length);
  Cursor here{.at = begin, .end = min(tiles, begin + length)};
  if (!here.done()) here.find(args, before);
  Cursor ahead = here;
  auto fetch_next = [&](uint32_t turn) {
    if (!ahead.done()) {
      fetch<HeadDim, Cache>(args, ahead, ring + turn % kStages * kStage, lane);
      ahead.next(args, before);
    }
    commit_copies();
  };
  uint32_t fetched = 0;
  while (fetched < kStages - 1 && !ahead.done() && !ahead.newest()) fetch_next(fetched++);
  wait_for_last();  // also those with nothing to do: whoever waits for this kernel waits for those before it
  if (here.done()) return;
  while (fetched < kStages - 1) fetch_next(fetched++);

  uint32_t q[HeadDim / 16][2];
  State<HeadDim, Cache> state;
  uint32_t piece = here.at;  // where this stretch's part of the row begins
  for (uint32_t turn = 0; !here.done(); ++turn) {
    if (here.at == piece) {
      load_queries<HeadDim, Cache>(args, here, q, lane);
      state.clear(args, here.kv_head);
    }
    wait_copies<kStages - 2>();
    __syncwarp();  // every lane's copies are there, and the stage filled next has been read, in the turn before
    fetch_next(turn + kStages - 1);
    state.add(q, ring + turn % kStages * kStage, here.first_token(), here.tokens, lane);
    if (here.at + 1 == here.row_end || here.at + 1 == here.end) {
      const bool whole = piece == here.row_begin && here.at + 1 == here.row_end;
      state.finish(args, here, whole, 2 * stretch + (piece == begin ? 0 : 1), lane);
      piece = here.at + 1;
    }
    here.next(args, before);
  }
}

// The softmax over some parts of a row, four elements of the head a thread.
struct Weighed {
  float best = -INFINITY, mass = 0;
  float4 sum{};

  __device__ void add(float2 weight, float4 part) {
    if (weight.y == 0) return;
    const float top = fmaxf(best, weight.x), shrink = fast_exp2(best - top), grow = fast_exp2(weight.x - top);
    best = top;
    mass = mass * shrink + weight.y * grow;
    sum.x = sum.x * shrink + part.x * grow, sum.y = sum.y * shrink + part.y * grow;
    sum.z = sum.z * shrink + part.z * grow, sum.w = sum.w * shrink + part.w * grow;
  }
};

// Weighs the parts of a row that was cut. A block takes one query head of it: parts are dealt to two sets of threads,
// each thread with four elements of the head. Blocks are found either by row or, where there are fewer stretches than
// rows, by the stretch that the row begins in: no more than one of them goes on in the next. They are small: all of
// them are there, and know their work, when the last blocks of decode_kernel end.
constexpr int kSets = 2, kPartsAtOnce = 4;
template <int HeadDim>
constexpr int kCombineColumns = HeadDim < 128 ? 32 : HeadDim / 4;

template <int HeadDim>
__global__ void __launch_bounds__(kSets* kCombineColumns<HeadDim>) combine_kernel(Decode args, bool by_stretch) {
  constexpr int kColumns = kCombineColumns<HeadDim>;
  extern __shared__ uint32_t before[];
  __shared__ Weighed others[kColumns];
  allow_next();
  lay_out(args, before);
  const uint32_t tiles = before[args.sequences] * rows(args), length = stretch_length(tiles, args.stretches);
  Cursor row{};
  bool mine;
  if (by_stretch) {
    row.at = (blockIdx.x + 1) * length - 1;
    mine = row.at < tiles;
  } else {
    const uint32_t sequence = blockIdx.x / rows(args), row_tiles = before[sequence + 1] - before[sequence];
    row.at = before[sequence] * rows(args) + blockIdx.x % rows(args) * row_tiles;
    mine = row_tiles > 0;
  }
  if (mine) row.find(args, before);
  const uint32_t first = row.row_begin / length, last = (row.row_end - 1) / length;
  mine = mine && first != last && (!by_stretch || first == blockIdx.x) && blockIdx.y < row.queries;
  wait_for_last();
  if (!mine) return;
  const uint32_t parts = last - first + 1;
  const uint32_t set = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  const bool within = column < HeadDim / 4;
  const auto at = [&](uint32_t part) {
    return size_t{2 * (first + part) + (part == 0 && row.row_begin % length != 0 ? 1 : 0)} * args.queries + blockIdx.y;
  };
  Weighed mean;
  for (uint32_t from = set; from < parts; from += kSets * kPartsAtOnce) {
    float2 weights[kPartsAtOnce];
    float4 values[kPartsAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kPartsAtOnce; ++i) {
      const uint32_t part = from + i * kSets;
      const bool there = part < parts && within;
      weights[i] = there ? args.weights[at(part)] : float2{};
      values[i] = there ? reinterpret_cast<const float4*>(args.partial + at(part) * HeadDim)[column] : float4{};
    }
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) mean.add(weights[i], values[i]);
  }
  if (set > 0) others[column] = mean;
  __syncthreads();
  if (set > 0 || !within) return;
  mean.add({others[column].best, others[column].mass}, others[column].sum);
  const size_t out = row.first_row(args) + blockIdx.y;
  args.out.store(out * HeadDim + 4 * column, mean.sum * (out_factor(args, row.kv_head) / mean.mass));
}

constexpr int kStaticShared = 256;  // bytes that decode_kernel has besides, at most

// Warps a block and blocks a multiprocessor: as much in flight as shared memory holds.
struct Shape {
  int warps, blocks;
  size_t shared;
};

Shape shape(const DeviceInfo& device, size_t warp_bytes, uint32_t sequences) {
  const size_t geometry = (sequences + 1) * sizeof(uint32_t);
  int warps = kMaxWarps;
  while (warps > 1 && warps * warp_bytes + geometry > static_cast<size_t>(device.shared_memory - kStaticShared))
    --warps;
  const size_t shared = warps * warp_bytes + geometry;
  const int blocks = std::clamp(static_cast<int>(device.shared_memory / (shared + 2048)), 1, 3);
  return {warps, blocks, shared};
}

template <int HeadDim, class Cache>
void launch(Decode args, const DeviceInfo& device, const Stream& stream) {
  const Shape s = shape(device, kStages * stage_bytes<HeadDim, Cache>, args.sequences);
  const uint32_t blocks = s.blocks * device.multiprocessors;
  args.stretches = blocks * s.warps;
  allow_shared(decode_kernel<HeadDim, Cache>, device.shared_memory - kStaticShared);
  launch_early(stream, blocks, s.warps * 32, s.shared, decode_kernel<HeadDim, Cache>, args);
  const uint32_t rows = args.sequences * args.kv_heads * args.shares;
  launch_early(stream, dim3(std::min(rows, args.stretches), args.queries), kSets * kCombineColumns<HeadDim>,
               (args.sequences + 1) * sizeof(uint32_t), combine_kernel<HeadDim>, args, rows > args.stretches);
}

template <int HeadDim>
void launch(const Decode& args, const DeviceInfo& device, const Stream& stream) {
  args.key_scales != nullptr ? launch<HeadDim, uint8_t>(args, device, stream)
                             : launch<HeadDim, bf16_t>(args, device, stream);
}

uint32_t most_stretches(const DeviceInfo& device) { return 3 * device.multiprocessors * kMaxWarps; }

}  // namespace

size_t decode_scratch_bytes(const DeviceInfo& device, uint32_t head_dim, uint32_t group) {
  return size_t{2} * most_stretches(device) * group * (head_dim * sizeof(float) + sizeof(float2));
}

void decode_attention(const AttentionArgs& args, const DeviceInfo& device, void* scratch, const Stream& stream) {
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
                      .shares = shares,
                      .queries = (group + shares - 1) / shares,
                      .score = ScoreScale::of(args.scale, args.soft_cap),
                      .out = {args.out, args.quantize.scale},
                      .partial = reinterpret_cast<float*>(weights + size_t{2} * most_stretches(device) * group),
                      .weights = weights,
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
