// Attention of sequences with several new tokens over their paged cache, which already holds the new keys and values:
// chunked prefill and shared prefixes are nothing special.
//
// One block takes 128 new tokens of one query head; each of its eight warps 16 of them, held as A fragments for the
// whole run. Tiles of keys and values pass through a double buffer in shared memory (cp.async); where their rows lie is
// looked up in the block table a tile ahead, row by row, so any page size will do. The softmax runs along in registers.
// Tiles that no token of the block sees, before the window or after the last position, are never read; masks are
// applied only where a tile's edge crosses one. It uses mma.sync, which every GPU from
// sm_80 on has; sm_90's wgmma would be faster.
#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/ops.h"

namespace gemma_cuda::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kQueries = 16 * kWarps;  // new tokens of a block

struct Prefill {
  const bf16_t* q;
  const bf16_t* keys;
  const bf16_t* values;
  const uint32_t* cu_seqlens;
  const uint32_t* kv_len;
  const uint32_t* block_table;
  uint32_t max_pages, page_size, heads, kv_heads, window;
  ScoreScale score;
  bf16_t* out;
};

// Keys in a tile; and in the part of one that a warp scores at a time, as many as its registers hold.
template <int HeadDim, bool Large>
constexpr int kKeys = HeadDim <= 128 || Large ? 64 : 32;
template <int HeadDim>
constexpr int kScored = HeadDim <= 128 ? 64 : 32;

template <int HeadDim, int Keys>
struct Shared {
  bf16_t tiles[2][2][Keys * HeadDim];  // [stage][keys, values]
  int64_t rows[2][Keys];               // where a tile's rows begin in the cache; -1: nowhere
};

// Looks up the rows of the tile that begins at `token`; those from `end` on are nowhere.
template <int HeadDim, int Keys>
__device__ void find_rows(const Prefill& args, uint32_t sequence, uint32_t kv_head, uint32_t token, uint32_t end,
                          int64_t (&rows)[Keys]) {
  if (threadIdx.x >= Keys) return;
  const uint32_t position = token + threadIdx.x;
  if (position < end) {
    const uint64_t page = args.block_table[size_t{sequence} * args.max_pages + position / args.page_size];
    rows[threadIdx.x] = ((page * args.kv_heads + kv_head) * args.page_size + position % args.page_size) * HeadDim;
  } else {
    rows[threadIdx.x] = -1;
  }
}

// Starts the copies of a tile's rows; those that are nowhere become zeros.
template <int HeadDim, int Keys>
__device__ void fetch(const Prefill& args, const int64_t (&rows)[Keys], bf16_t (&to)[2][Keys * HeadDim]) {
  constexpr int kChunks = Tile<HeadDim>::kChunks;
  const uint32_t keys = shared_address(to[0]), values = shared_address(to[1]);
#pragma unroll
  for (int i = threadIdx.x; i < Keys * kChunks; i += kWarps * 32) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t from = rows[row];
    const size_t offset = (from < 0 ? 0 : from) + chunk * 8;
    copy_async(Tile<HeadDim>::chunk(keys, row, chunk), args.keys + offset, from >= 0);
    copy_async(Tile<HeadDim>::chunk(values, row, chunk), args.values + offset, from >= 0);
  }
}

// Sixteen queries of a warp: what they see, and the running softmax over it.
template <int HeadDim>
struct Rows {
  uint32_t q[HeadDim / 16][4];
  float out[HeadDim / 8][4];
  float best[2], sum[2];
  uint32_t position;  // of row 0

  __device__ void load(const bf16_t* from, size_t stride, uint32_t rows, int lane) {
    const uint32_t row = lane / 4;
    auto pair = [&](uint32_t r, int column) {
      return r < rows ? *reinterpret_cast<const uint32_t*>(from + r * stride + column + lane % 4 * 2) : 0u;
    };
#pragma unroll
    for (int k = 0; k < HeadDim / 16; ++k) {
      q[k][0] = pair(row, k * 16);
      q[k][1] = pair(row + 8, k * 16);
      q[k][2] = pair(row, k * 16 + 8);
      q[k][3] = pair(row + 8, k * 16 + 8);
    }
#pragma unroll
    for (auto& fragment : out) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
    best[0] = best[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // The keys at `token` and after it, as many as are scored at a time; they are at rows `row` of the tile.
  __device__ void add(const Prefill& args, uint32_t keys, uint32_t values, int row, uint32_t token, int lane) {
    constexpr int kTile = kScored<HeadDim>;
    // Warps whose rows see nothing of the tile, or all of it, need no mask.
    if (token > position + 15 || (args.window != 0 && token + kTile + args.window <= position + 1)) return;
    const bool edge = token + kTile > position + 1 || (args.window != 0 && token + args.window <= position + 15);
    float scores[kTile / 8][4] = {};
#pragma unroll
    for (int k = 0; k < HeadDim / 16; ++k)
#pragma unroll
      for (int n = 0; n < kTile / 16; ++n) {
        uint32_t b[4];
        Tile<HeadDim>::columns(b, keys, row + n * 16, k * 16, lane);
        mma(scores[2 * n], q[k], b[0], b[1]);
        mma(scores[2 * n + 1], q[k], b[2], b[3]);
      }
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = args.score(scores[n][i]);
        if (!edge) continue;
        const uint32_t key = token + n * 8 + lane % 4 * 2 + i % 2, query = position + lane / 4 + i / 2 * 8;
        if (key > query || (args.window != 0 && key + args.window <= query)) scores[n][i] = -INFINITY;
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      top = fmaxf(top, best[half]);
      const float base = top == -INFINITY ? 0 : top;  // a row may see nothing of the tile, nor of those before
      const float shrink = fast_exp2(best[half] - base);
      best[half] = top;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) sum[half] += scores[n][i] = fast_exp2(scores[n][i] - base);
#pragma unroll
      for (auto& fragment : out) {
        fragment[2 * half] *= shrink;
        fragment[2 * half + 1] *= shrink;
      }
    }
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      const uint32_t p[4] = {pack(scores[2 * k][0], scores[2 * k][1]), pack(scores[2 * k][2], scores[2 * k][3]),
                             pack(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                             pack(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < HeadDim / 16; ++n) {
        uint32_t b[4];
        Tile<HeadDim>::rows(b, values, row + k * 16, n * 16, lane);
        mma(out[2 * n], p, b[0], b[1]);
        mma(out[2 * n + 1], p, b[2], b[3]);
      }
    }
  }

  __device__ void store(bf16_t* to, size_t stride, uint32_t rows, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
      const uint32_t row = lane / 4 + 8 * half;
      if (row >= rows) continue;
      const float inverse = 1 / sum[half];
#pragma unroll
      for (int n = 0; n < HeadDim / 8; ++n)
        *reinterpret_cast<uint32_t*>(to + row * stride + n * 8 + lane % 4 * 2) =
            pack(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
    }
  }
};

template <int HeadDim, int Keys>
__global__ void __launch_bounds__(kWarps * 32, 1) prefill_kernel(Prefill args) {
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<Shared<HeadDim, Keys>*>(memory);
  allow_next();
  wait_for_last();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t sequence = blockIdx.z, head = blockIdx.y, kv_head = head / (args.heads / args.kv_heads);
  const uint32_t begin = args.cu_seqlens[sequence], rows = args.cu_seqlens[sequence + 1] - begin;
  // The last blocks see the most keys; they come first.
  const uint32_t block = gridDim.x - 1 - blockIdx.x, row = block * kQueries;
  if (rows == 1 || row >= rows) return;  // one new token: decode_attention

  const uint32_t first_position = args.kv_len[sequence] - rows + row;
  const uint32_t end = first_position + min(uint32_t{kQueries}, rows - row);  // of the keys that are seen
  const uint32_t first = args.window != 0 && first_position + 1 > args.window ? first_position + 1 - args.window : 0;
  uint32_t token = first / Keys * Keys;

  const uint32_t mine = row + warp * 16, left = mine < rows ? min(16u, rows - mine) : 0;
  const size_t stride = size_t{args.heads} * HeadDim;
  const size_t at = (size_t{begin} + mine) * stride + size_t{head} * HeadDim;
  Rows<HeadDim> queries;
  queries.position = first_position + warp * 16;
  queries.load(args.q + at, stride, left, lane);

  find_rows<HeadDim>(args, sequence, kv_head, token, end, shared.rows[0]);
  find_rows<HeadDim>(args, sequence, kv_head, token + Keys, end, shared.rows[1]);
  __syncthreads();
  fetch<HeadDim>(args, shared.rows[0], shared.tiles[0]);
  commit_copies();
  for (uint32_t turn = 0; token < end; ++turn, token += Keys) {
    const uint32_t now = turn % 2, next = 1 - now;
    if (token + Keys < end) fetch<HeadDim>(args, shared.rows[next], shared.tiles[next]);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    find_rows<HeadDim>(args, sequence, kv_head, token + 2 * Keys, end, shared.rows[now]);
    const uint32_t keys = shared_address(shared.tiles[now][0]), values = shared_address(shared.tiles[now][1]);
#pragma unroll
    for (int part = 0; part < Keys; part += kScored<HeadDim>) queries.add(args, keys, values, part, token + part, lane);
    __syncthreads();
  }
  queries.store(args.out + at, stride, left, lane);
}

template <int HeadDim, bool Large>
void launch(const Prefill& args, uint32_t max_new, uint32_t sequences, const Stream& stream) {
  constexpr int kTile = kKeys<HeadDim, Large>;
  constexpr size_t kShared = sizeof(Shared<HeadDim, kTile>);
  GEMMA_CUDA_CHECK(cudaFuncSetAttribute(prefill_kernel<HeadDim, kTile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(kShared)));
  launch_early(stream, dim3((max_new + kQueries - 1) / kQueries, args.heads, sequences), kWarps * 32, kShared,
               prefill_kernel<HeadDim, kTile>, args);
}

}  // namespace

void prefill_attention(const AttentionArgs& args, const DeviceInfo& device, const Stream& stream) {
  const Prefill prefill{.q = static_cast<const bf16_t*>(args.q),
                        .keys = static_cast<const bf16_t*>(args.cache.keys),
                        .values = static_cast<const bf16_t*>(args.cache.values),
                        .cu_seqlens = args.cu_seqlens,
                        .kv_len = args.kv_len,
                        .block_table = args.block_table,
                        .max_pages = args.max_pages,
                        .page_size = args.cache.page_size,
                        .heads = args.heads,
                        .kv_heads = args.cache.kv_heads,
                        .window = args.window,
                        .score = ScoreScale::of(args.scale, args.soft_cap),
                        .out = static_cast<bf16_t*>(args.out)};
  switch (args.cache.head_dim) {
    case 16: return launch<16, false>(prefill, args.max_new, args.sequences, stream);
    case 32: return launch<32, false>(prefill, args.max_new, args.sequences, stream);
    case 64: return launch<64, false>(prefill, args.max_new, args.sequences, stream);
    case 128: return launch<128, false>(prefill, args.max_new, args.sequences, stream);
    case 256:
      return static_cast<size_t>(device.shared_memory) >= sizeof(Shared<256, kKeys<256, true>>)
                 ? launch<256, true>(prefill, args.max_new, args.sequences, stream)
                 : launch<256, false>(prefill, args.max_new, args.sequences, stream);
    default: throw Error::invalid_argument("head_dim " + std::to_string(args.cache.head_dim) + " has no CUDA kernel");
  }
}

}  // namespace gemma_cuda::cuda
