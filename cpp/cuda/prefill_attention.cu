// Attention of sequences with several new tokens over their paged cache, which already holds the new keys and values:
// chunked prefill and shared prefixes are nothing special.
//
// One block takes a query tile, 128 new tokens, of one query head; each of its eight warps 16 of them, held as A
// fragments for the whole run. Tiles of keys and values pass through a double buffer in shared memory (cp.async); where
// their rows lie is looked up in the block table a tile ahead, row by row, so any page size will do. The softmax runs
// along in registers. Tiles that no token of the block sees, before the window or after the last position, are never
// read; masks are applied only where a tile's edge crosses one. Keys and values in FP8 become f16 on their way to
// shared memory. It uses mma.sync, which every GPU from sm_80 on has; prefill_hopper.cu is its faster form for sm_90.
#include "cuda/ops.h"
#include "cuda/prefill.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr int kWarps = 8;
static_assert(16 * kWarps == kQueryTile);

// Keys in a tile; and in the part of one that a warp scores at a time, as many as its registers hold.
template <int HeadDim, bool Large>
constexpr int kKeys = HeadDim <= 128 || Large ? 64 : 32;
template <int HeadDim>
constexpr int kScored = HeadDim <= 128 ? 64 : 32;

template <int HeadDim, int Keys>
struct Shared {
  uint16_t tiles[2][2][Keys * HeadDim];  // [stage][keys, values], bf16 or f16
  int64_t rows[2][Keys];                 // where a tile's rows begin in the cache; -1: nowhere
};

// Starts the copies of a tile's rows; those that are nowhere become zeros.
template <int HeadDim, int Keys>
__device__ void fetch(bf16_t, const Prefill& args, const int64_t (&rows)[Keys], uint16_t (&to)[2][Keys * HeadDim]) {
  constexpr int kChunks = Tile<HeadDim>::kChunks;
  const uint32_t keys = shared_address(to[0]), values = shared_address(to[1]);
#pragma unroll
  for (int i = threadIdx.x; i < Keys * kChunks; i += kWarps * 32) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t from = rows[row];
    const size_t offset = (from < 0 ? 0 : from) + chunk * 8;
    copy_async(Tile<HeadDim>::chunk(keys, row, chunk), static_cast<const bf16_t*>(args.keys) + offset, from >= 0);
    copy_async(Tile<HeadDim>::chunk(values, row, chunk), static_cast<const bf16_t*>(args.values) + offset, from >= 0);
  }
}
template <int HeadDim, int Keys>
__device__ void fetch(uint8_t, const Prefill& args, const int64_t (&rows)[Keys], uint16_t (&to)[2][Keys * HeadDim]) {
  constexpr int kRuns = HeadDim / 16;  // 16 bytes of a row, which become two chunks
  const uint32_t keys = shared_address(to[0]), values = shared_address(to[1]);
  auto bring = [](const void* from, size_t offset, bool there, uint32_t tile, int row, int run) {
    const uint4 narrow =
        there ? __ldcg(reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(from) + offset)) : uint4{};
    uint4 first, second;
    widen_e4m3(narrow, first, second);
    store_chunk(Tile<HeadDim>::chunk(tile, row, 2 * run), first);
    store_chunk(Tile<HeadDim>::chunk(tile, row, 2 * run + 1), second);
  };
#pragma unroll
  for (int i = threadIdx.x; i < Keys * kRuns; i += kWarps * 32) {
    const int row = i / kRuns, run = i % kRuns;
    const bool there = rows[row] >= 0;
    const size_t offset = (there ? rows[row] : 0) + run * 16;
    bring(args.keys, offset, there, keys, row, run);
    bring(args.values, offset, there, values, row, run);
  }
}

// Sixteen queries of a warp: what they see, and the running softmax over it.
template <int HeadDim, class Type>
struct Rows {
  ScoreScale score_scale;
  uint32_t q[HeadDim / 16][4];
  float out[HeadDim / 8][4] = {};
  RunningSoftmax softmax;
  Sight sight;

  __device__ void load(const bf16_t* from, size_t stride, uint32_t rows, int lane) {
    const uint32_t row = lane / 4;
    auto pair = [&](uint32_t r, int column) {
      return r < rows ? Type::of_bf16(*reinterpret_cast<const uint32_t*>(from + r * stride + column + lane % 4 * 2))
                      : 0u;
    };
#pragma unroll
    for (int k = 0; k < HeadDim / 16; ++k) {
      q[k][0] = pair(row, k * 16);
      q[k][1] = pair(row + 8, k * 16);
      q[k][2] = pair(row, k * 16 + 8);
      q[k][3] = pair(row + 8, k * 16 + 8);
    }
  }

  // The keys at `token` and after it, as many as are scored at a time; they are at rows `row` of the tile.
  __device__ void add(uint32_t keys, uint32_t values, int row, uint32_t token, int lane) {
    constexpr int kTile = kScored<HeadDim>;
    if (sight.none_of(token, kTile)) return;
    float scores[kTile / 8][4] = {};
#pragma unroll
    for (int k = 0; k < HeadDim / 16; ++k)
#pragma unroll
      for (int n = 0; n < kTile / 16; ++n) {
        uint32_t b[4];
        Tile<HeadDim>::columns(b, keys, row + n * 16, k * 16, lane);
        mma(Type{}, scores[2 * n], q[k], b[0], b[1]);
        mma(Type{}, scores[2 * n + 1], q[k], b[2], b[3]);
      }
    const float factor = score(scores, score_scale, sight, token, lane);
    float shrink[2];
    if (softmax.add(scores, factor, shrink)) shrink_sums(out, shrink);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t p[4];
      narrow(Type{}, p, scores, k);
#pragma unroll
      for (int n = 0; n < HeadDim / 16; ++n) {
        uint32_t b[4];
        Tile<HeadDim>::rows(b, values, row + k * 16, n * 16, lane);
        mma(Type{}, out[2 * n], p, b[0], b[1]);
        mma(Type{}, out[2 * n + 1], p, b[2], b[3]);
      }
    }
  }
};

template <int HeadDim, int Keys, class Cache>
__global__ void __launch_bounds__(kWarps * 32, 1) prefill_kernel(Prefill args) {
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<Shared<HeadDim, Keys>*>(memory);
  allow_next();
  wait_for_last();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  PrefillWork work;
  if (!work.find(args, HeadDim, blockIdx.y, blockIdx.x)) return;

  const uint32_t mine = warp * 16, left = mine < work.rows ? min(16u, work.rows - mine) : 0;
  const size_t at = work.at + mine * work.stride;
  Rows<HeadDim, typename CacheType<Cache>::Type> queries;
  queries.score_scale = args.score_of(work.kv_head);
  queries.sight = {work.position + mine, args.window};
  queries.load(args.q + at, work.stride, left, lane);

  auto find_rows = [&](uint32_t key, int64_t(&rows)[Keys]) {
    if (threadIdx.x >= Keys) return;
    const uint32_t row = work.row_of(args, key + threadIdx.x);
    rows[threadIdx.x] = row == kNowhere ? -1 : int64_t{row} * HeadDim;
  };
  uint32_t token = work.first_key / Keys * Keys;
  find_rows(token, shared.rows[0]);
  find_rows(token + Keys, shared.rows[1]);
  __syncthreads();
  fetch<HeadDim>(Cache{}, args, shared.rows[0], shared.tiles[0]);
  commit_copies();
  for (uint32_t turn = 0; token < work.end_key; ++turn, token += Keys) {
    const uint32_t now = turn % 2, next = 1 - now;
    if (token + Keys < work.end_key) fetch<HeadDim>(Cache{}, args, shared.rows[next], shared.tiles[next]);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    find_rows(token + 2 * Keys, shared.rows[now]);
    const uint32_t keys = shared_address(shared.tiles[now][0]), values = shared_address(shared.tiles[now][1]);
#pragma unroll
    for (int part = 0; part < Keys; part += kScored<HeadDim>) queries.add(keys, values, part, token + part, lane);
    __syncthreads();
  }
  store_rows(queries.out, queries.softmax, args.out_factor(work.kv_head), args.out, at, work.stride, left, lane);
}

template <int HeadDim, bool Large, class Cache>
void launch(const Prefill& args, const Stream& stream) {
  constexpr int kTile = kKeys<HeadDim, Large>;
  constexpr size_t kShared = sizeof(Shared<HeadDim, kTile>);
  const auto kernel = prefill_kernel<HeadDim, kTile, Cache>;
  allow_shared(kernel, kShared);
  launch_early(stream, dim3(args.heads, args.tiles), kWarps * 32, kShared, kernel, args);
}

template <int HeadDim, bool Large>
void launch(const Prefill& args, const Stream& stream) {
  args.key_scales != nullptr ? launch<HeadDim, Large, uint8_t>(args, stream)
                             : launch<HeadDim, Large, bf16_t>(args, stream);
}

}  // namespace

void prefill_attention(const AttentionArgs& args, const DeviceInfo& device, const Stream& stream) {
  const Prefill prefill{.q = static_cast<const bf16_t*>(args.q),
                        .keys = args.cache.keys,
                        .values = args.cache.values,
                        .key_scales = args.cache.key_scales,
                        .value_scales = args.cache.value_scales,
                        .cu_seqlens = args.cu_seqlens,
                        .kv_len = args.kv_len,
                        .block_table = args.block_table,
                        .query_tiles = args.query_tiles,
                        .tiles = args.tiles,
                        .max_pages = args.max_pages,
                        .page_size = args.cache.page_size,
                        .heads = args.heads,
                        .kv_heads = args.cache.kv_heads,
                        .window = args.window,
                        .score = ScoreScale::of(args.scale, args.soft_cap),
                        .out = {args.out, args.quantize.scale}};
  if (prefill_hopper(prefill, args.cache.head_dim, device, stream)) return;
  switch (args.cache.head_dim) {
    case 16: return launch<16, false>(prefill, stream);
    case 32: return launch<32, false>(prefill, stream);
    case 64: return launch<64, false>(prefill, stream);
    case 128: return launch<128, false>(prefill, stream);
    case 256:
      return static_cast<size_t>(device.shared_memory) >= sizeof(Shared<256, kKeys<256, true>>)
                 ? launch<256, true>(prefill, stream)
                 : launch<256, false>(prefill, stream);
    default: throw Error::invalid_argument("head_dim " + std::to_string(args.cache.head_dim) + " has no CUDA kernel");
  }
}

}  // namespace gemma_cuda::cuda
