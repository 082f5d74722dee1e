// Which tiles of keys and values every warp of decode attention takes, computed once for all layers of a pass that see
// alike: a warp then begins with one read, where finding its tiles itself took it some two us of a layer.
//
// Every (sequence, K/V head) is a row of tiles of 16 tokens; all rows laid end to end make one line, and the line is
// cut into equal stretches, one a warp, wherever the cuts fall. Lengths, however different, need no other balancing.
// Where they are much the same, each warp has whole rows.
// Where there are fewer rows than blocks, each has some blocks of its own, whose warps have even shares of it. A group
// of more query heads than a tile's product has columns is several rows, which read the same tiles. A sequence with any
// other number of new tokens than one has no tiles here.
//
// Lengths are read on the device, so that a captured launch replays with any.
#pragma once

#include <cstdint>

#include "cuda/decode_tiles.cuh"
#include "cuda/ops.h"

namespace gemma_cuda::cuda {

struct DecodeTables {
  const uint32_t* cu_seqlens;
  const uint32_t* kv_len;
  uint32_t sequences, kv_heads, window;
  uint32_t shares;  // rows that a K/V head's group of queries is

  __device__ uint32_t rows() const { return kv_heads * shares; }  // of a sequence
};

struct Range {  // of the tokens a sequence's new token sees
  uint32_t first, end;
  __device__ uint32_t first_tile() const { return first / kTileTokens; }
  __device__ uint32_t tiles() const { return (end + kTileTokens - 1) / kTileTokens - first_tile(); }
};

__device__ inline Range range(const DecodeTables& tables, uint32_t sequence) {
  if (tables.cu_seqlens[sequence + 1] - tables.cu_seqlens[sequence] != 1) return {0, 0};
  const uint32_t end = tables.kv_len[sequence];
  return {tables.window != 0 && end > tables.window ? end - tables.window : 0, end};
}

// A row, and where in the line of all rows' tiles its own are; or, where rows have blocks of their own, its blocks in
// the line of all of them.
struct Row {
  uint32_t sequence, kv_head, share;  // the share of the group's queries that the row is of
  uint32_t begin, count;
  Range tokens;

  // The next of the line of tiles: there is one.
  __device__ void next(const DecodeTables& tables) {
    begin += count;
    if (++share < tables.shares) return;
    share = 0;
    if (++kv_head < tables.kv_heads) return;
    kv_head = 0;
    do tokens = range(tables, ++sequence);
    while (tokens.tiles() == 0);
    count = tokens.tiles();
  }
};

// What a warp takes: tiles of the line, or of one row, whose blocks are its own.
struct alignas(16) Stretch {
  uint32_t at, end;
  Row row;          // that begins it, or has it
  uint32_t length;  // tiles of a warp
  uint32_t apart;   // whether rows have blocks of their own
  uint32_t block;   // then, the number of the warp's block among the row's
};
static_assert(sizeof(Stretch) == 48);

// How many blocks of how many warps attention has; fewer tiles than `least` are not worth a warp.
struct DecodeGrid {
  uint32_t blocks, warps, least;
  bool many;  // more rows than blocks, whatever their lengths
};

// Writes all stretches.
void plan_decode(const DecodeTables& tables, const DecodeGrid& grid, int most_shared, Stretch* stretches,
                 const Stream& stream);

}  // namespace gemma_cuda::cuda
