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
__device__ inline void store_chunk(uint32_t to, const uint4& chunk) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(chunk.x), "r"(chunk.y), "r"(chunk.z),
               "r"(chunk.w)
               : "memory");
}

// Work of a block: a query tile of one head. The tiles come in order, the longest work first, each with all its heads:
// at the end there are short ones left for the multiprocessors that are free.
struct PrefillWork {
  uint32_t sequence, head, kv_head;
  uint32_t rows;       // new tokens in the tile
  size_t at;           // of the first one's queries, in q and out
  size_t stride;       // from one to the next
  uint32_t position;   // of the first one
  uint32_t first_key;  // that any of them sees
  uint32_t end_key;

  // False: the block has nothing to do.
  __device__ bool find(const Prefill& args, int head_dim) {
    const QueryTile tile = args.query_tiles[blockIdx.y];
    if (tile.sequence == kNoSequence) return false;
    sequence = tile.sequence;
    head = blockIdx.x;
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

  // Which row of the cache is lane i's of a warp that has every fourth key from `key` + `warp` on.
  __device__ uint32_t row_of(const Prefill& args, uint32_t key, int warp, int lane, int keys) const {
    const int64_t row = lane < keys / 4 ? row_of(args, key + warp + 4 * lane, 1) : -1;
    return static_cast<uint32_t>(row);
  }
  // Where a key's row begins in the cache; -1 for those past the end.
  __device__ int64_t row_of(const Prefill& args, uint32_t key, int head_dim) const {
    if (key >= end_key) return -1;
    const uint64_t page = args.block_table[size_t{sequence} * args.max_pages + key / args.page_size];
    return ((page * args.kv_heads + kv_head) * args.page_size + key % args.page_size) * head_dim;
  }
};

// The kernel for sm_90, head_dim 128 and 256. False: this is none, or the program was built without sm_90a.
bool prefill_hopper(const Prefill& args, uint32_t head_dim, const DeviceInfo& device, const Stream& stream);

}  // namespace gemma_cuda::cuda
