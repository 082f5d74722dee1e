// What the two kernels of prefill attention share: their arguments, and what a block has to do.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"

namespace gemma_cuda::cuda {

struct Prefill {
  const bf16_t* q;
  const bf16_t* keys;
  const bf16_t* values;
  const uint32_t* cu_seqlens;
  const uint32_t* kv_len;
  const uint32_t* block_table;
  const QueryTile* query_tiles;
  uint32_t tiles, max_pages, page_size, heads, kv_heads, window;
  ScoreScale score;
  bf16_t* out;
};

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
