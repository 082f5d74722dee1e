// What the two kernels of prefill attention share: their arguments, and what a block has to do.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"

namespace gemma_cuda::cuda {

struct Prefill {
  const bf16_t* q;
  const void* keys;  // bf16, or FP8 with scales
  const void* values;
  const float* key_scales;
  const float* value_scales;
  const uint32_t* cu_seqlens;
  const uint32_t* kv_len;
  const uint32_t* block_table;
  const QueryTile* query_tiles;
  uint32_t tiles, max_pages, page_size, heads, kv_heads, window;
  uint32_t section_heads = 0;  // heads whose works follow each other, for their keys and values to stay in the L2 cache
  ScoreScale score;
  AttentionOut out;

  __device__ ScoreScale score_of(uint32_t kv_head) const {
    ScoreScale of = score;
    if (key_scales != nullptr) of.scale *= key_scales[kv_head];
    return of;
  }
  // What a head's results are multiplied by on their way out.
  __device__ float out_factor(uint32_t kv_head) const {
    return out.factor() * (value_scales != nullptr ? value_scales[kv_head] : 1.0f);
  }
};

// What keys and values of this type are multiplied as.
template <class Cache>
struct CacheType;
template <>
struct CacheType<bf16_t> {
  using Type = Bf16;
};
template <>
struct CacheType<uint8_t> {
  using Type = F16;
};

// Sixteen E4M3 as f16: two chunks of 16 bytes.
__device__ inline void widen_e4m3(const uint4& from, uint4& first, uint4& second) {
  first =
      make_uint4(F16::of_e4m3(from.x), F16::of_e4m3(from.x >> 16), F16::of_e4m3(from.y), F16::of_e4m3(from.y >> 16));
  second =
      make_uint4(F16::of_e4m3(from.z), F16::of_e4m3(from.z >> 16), F16::of_e4m3(from.w), F16::of_e4m3(from.w >> 16));
}
__device__ inline uint4 load_chunk(uint32_t from) {
  uint4 chunk;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "r"(from)
               : "memory");
  return chunk;
}
__device__ inline void store_chunk(uint32_t to, const uint4& chunk) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(chunk.x), "r"(chunk.y), "r"(chunk.z),
               "r"(chunk.w)
               : "memory");
}

constexpr uint32_t kNowhere = ~0u;

// Work of a block: a query tile of one head. The tiles come in order, the longest work first, each with all its heads.
struct PrefillWork {
  uint32_t sequence, head, kv_head;
  uint32_t rows;       // new tokens in the tile
  size_t at;           // of the first one's queries, in q and out
  size_t stride;       // from one to the next
  uint32_t position;   // of the first one
  uint32_t first_key;  // that any of them sees
  uint32_t end_key;

  // False: the tile is none.
  __device__ bool find(const Prefill& args, int head_dim, uint32_t index, uint32_t of_head) {
    const QueryTile tile = args.query_tiles[index];
    if (tile.sequence == kNoSequence) return false;
    sequence = tile.sequence;
    head = of_head;
    kv_head = head / (args.heads / args.kv_heads);
    const uint32_t begin = args.cu_seqlens[sequence], fresh = args.cu_seqlens[sequence + 1] - begin;
    rows = min(kQueryTile, fresh - tile.row);
    stride = size_t{args.heads} * head_dim;
    at = (size_t{begin} + tile.row) * stride + size_t{head} * head_dim;
    position = args.kv_len[sequence] - fresh + tile.row;
    first_key = args.window != 0 && position + 1 > args.window ? position + 1 - args.window : 0;
    end_key = position + rows;
    return true;
  }

  // Where the tile of the first key begins, and how many there are to the last.
  __device__ uint32_t first_tile(uint32_t keys) const { return first_key / keys * keys; }
  __device__ static uint32_t tiles(uint32_t first, uint32_t end, uint32_t keys) {
    return (end - first + keys - 1) / keys;
  }

  // A key's row in the cache, which has fewer than 2^32; kNowhere for those past the end.
  __device__ uint32_t row_of(const Prefill& args, uint32_t key) const {
    if (key >= end_key) return kNowhere;
    const uint32_t page = args.block_table[size_t{sequence} * args.max_pages + key / args.page_size];
    return (page * args.kv_heads + kv_head) * args.page_size + key % args.page_size;
  }
};

// All works of a block of those that are as many as there are multiprocessors. Each section of heads is dealt out by
// itself, its longest work first, forth and back, so that what a block gets adds up to much the same. Every other
// section begins at the last block, and every two at another, lest where there is little to do a few get all of it.
struct Works {
  uint32_t round = 0;

  // False: no more.
  __device__ bool next(const Prefill& args, int head_dim, PrefillWork& work) {
    const uint32_t works = args.tiles * args.section_heads, rounds = (works + gridDim.x - 1) / gridDim.x;
    const uint32_t sections = args.heads / args.section_heads;
    while (round < sections * rounds) {
      const uint32_t section = round / rounds, deal = round % rounds;
      const uint32_t turn = (blockIdx.x + section / 2 * 2 * (gridDim.x / sections)) % gridDim.x;
      const uint32_t index = deal * gridDim.x + ((deal + section) % 2 == 0 ? turn : gridDim.x - 1 - turn);
      const uint32_t head = section * args.section_heads + index % args.section_heads;
      if (index < works && work.find(args, head_dim, index / args.section_heads, head)) {
        ++round;
        return true;
      }
      round = (section + 1) * rounds;  // nor are there others of the section
    }
    return false;
  }
};

// The kernel for sm_90, head_dim 128 and 256. False: this is none, or the program was built without sm_90a.
bool prefill_hopper(const Prefill& args, uint32_t head_dim, const DeviceInfo& device, const Stream& stream);

}  // namespace gemma_cuda::cuda
