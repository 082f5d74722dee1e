// Cuts the tiles of a step's keys and values into a stretch a warp (decode_plan.cuh). One block for each that attention
// will have, all of which lay the sequences out for themselves; some us, once a pass.
#include "cuda/decode_plan.cuh"
#include "cuda/launch.cuh"

namespace gemma_cuda::cuda {
namespace {

// Warps take whole rows where the longest is no more than so many tiles over an even share, and nearly all warps have
// one: a part of a row costs a warp some 6 us of waiting for small accesses. 1.3 % of 256 new tokens for 64 sequences
// in FP8, 0.6 % of 896.
constexpr uint32_t kMoreWholeTiles = 8;
constexpr uint32_t kMostSorted = 256;  // sequences

// The most tiles of a row for a block if every row has blocks of its own. 0 where there are not blocks enough for that,
// or some would have over a tile a warp more than an even share.
__device__ uint32_t tiles_a_block(const DecodeTables& tables, uint32_t least) {
  if (tables.sequences * tables.rows() > gridDim.x) return 0;
  const uint32_t warps = blockDim.x / 32, lane = threadIdx.x % 32;
  uint32_t tiles = 0;
  for (uint32_t sequence = lane; sequence < tables.sequences; sequence += 32) tiles += range(tables, sequence).tiles();
  tiles = __reduce_add_sync(~0u, tiles) * tables.rows();
  const uint32_t even = max(least * warps, (tiles + gridDim.x - 1) / gridDim.x);
  for (uint32_t most = even; most <= even + warps; most += (warps + 1) / 2) {
    uint32_t blocks = 0;
    for (uint32_t sequence = lane; sequence < tables.sequences; sequence += 32)
      blocks += (range(tables, sequence).tiles() + most - 1) / most;
    if (__reduce_add_sync(~0u, blocks) * tables.rows() <= gridDim.x) return most;
  }
  return 0;
}

// Prefix sums over the sequences into `before`, [sequences + 1], by the whole block: of the tiles of a row, or, if a
// block takes at most so many of one, of its blocks.
__device__ void lay_out(const DecodeTables& tables, uint32_t most, uint32_t* before) {
  __shared__ uint32_t sums[32];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t total = 0;
  for (uint32_t base = 0; base < tables.sequences; base += blockDim.x) {
    const uint32_t sequence = base + threadIdx.x;
    uint32_t sum = sequence < tables.sequences ? range(tables, sequence).tiles() : 0;
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
    if (sequence < tables.sequences) before[sequence + 1] = total + sum;
    total += __reduce_add_sync(~0u, of_warp);
  }
  if (threadIdx.x == 0) before[0] = 0;
  __syncthreads();
}

// The row that has number `at` of the line.
__device__ Row find(const DecodeTables& tables, const uint32_t* before, uint32_t at) {
  uint32_t low = 0, high = tables.sequences;  // before[low] * rows <= at < before[high] * rows
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (before[middle] * tables.rows() <= at ? low : high) = middle;
  }
  const uint32_t begin = before[low] * tables.rows(), count = before[low + 1] - before[low];
  const uint32_t row = (at - begin) / count;
  return {.sequence = low,
          .kv_head = row / tables.shares,
          .share = row % tables.shares,
          .begin = begin + row * count,
          .count = count,
          .tokens = range(tables, low)};
}

// How many whole rows, of one sequence, each warp takes, if none of them is much longer than an even share and no more
// than an eighth of the warps is left without; else 0.
__device__ uint32_t rows_a_warp(const DecodeTables& tables, uint32_t& longest) {
  if (tables.sequences > kMostSorted) return 0;
  const uint32_t warps = gridDim.x * blockDim.x / 32, lane = threadIdx.x % 32;
  uint32_t tiles = 0, most = 0, sequences = 0;
  for (uint32_t sequence = lane; sequence < tables.sequences; sequence += 32) {
    const uint32_t of_row = range(tables, sequence).tiles();
    tiles += of_row, most = max(most, of_row), sequences += of_row != 0 ? 1 : 0;
  }
  tiles = __reduce_add_sync(~0u, tiles) * tables.rows();
  longest = __reduce_max_sync(~0u, most);
  const uint32_t rows = __reduce_add_sync(~0u, sequences) * tables.rows(), each = (rows + warps - 1) / warps;
  if (each == 0 || tables.rows() % each != 0 || 8 * rows < 7 * each * warps) return 0;
  return each * longest <= (tiles + warps - 1) / warps + kMoreWholeTiles ? each : 0;
}

// The sequences from the one with most tiles on into `order`, by the whole block; `tiles` is room for as many.
__device__ void sort(const DecodeTables& tables, uint32_t* tiles, uint32_t* order) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t i = threadIdx.x; i < tables.sequences; i += blockDim.x) tiles[i] = range(tables, i).tiles();
  __syncthreads();
  for (uint32_t i = threadIdx.x / 32; i < tables.sequences; i += blockDim.x / 32) {
    uint32_t before = 0;
    for (uint32_t j = lane; j < tables.sequences; j += 32)
      before += tiles[j] > tiles[i] || (tiles[j] == tiles[i] && j < i) ? 1 : 0;
    before = __reduce_add_sync(~0u, before);
    if (lane == 0) order[before] = i;
  }
  __syncthreads();
}

// A warp's whole rows. They are dealt out from the longest on, one to every block, then one to every block backwards,
// and so on: so all blocks have about as many tiles. In the line every warp has as much room as the one that needs
// most.
__device__ Stretch whole_rows(const DecodeTables& tables, uint32_t each, uint32_t longest, uint32_t* memory) {
  const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32;
  uint32_t* const order = memory + tables.sequences;
  sort(tables, memory, order);
  Stretch work{};
  work.length = each * longest;
  work.at = work.end = (blockIdx.x * warps + warp) * work.length;
  const uint32_t turn = warp % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const uint32_t first = (warp * gridDim.x + turn) * each;
  if (first >= tables.sequences * tables.rows()) return work;
  const uint32_t sequence = order[first / tables.rows()], row = first % tables.rows();
  const Range tokens = range(tables, sequence);
  work.row = {.sequence = sequence,
              .kv_head = row / tables.shares,
              .share = row % tables.shares,
              .begin = work.at,
              .count = tokens.tiles(),
              .tokens = tokens};
  work.end += each * work.row.count;
  return work;
}

__device__ Stretch stretch_of(const DecodeTables& tables, uint32_t least, bool many, uint32_t* before) {
  const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32;
  uint32_t longest;
  if (const uint32_t each = many ? rows_a_warp(tables, longest) : 0) return whole_rows(tables, each, longest, before);
  const uint32_t most = many ? 0 : tiles_a_block(tables, least);
  lay_out(tables, most, before);
  const uint32_t all = before[tables.sequences] * tables.rows();
  Stretch work{};
  work.apart = most != 0;
  if (!work.apart) {
    work.length = max((all + gridDim.x * warps - 1) / (gridDim.x * warps), least);
    work.at = min(all, (blockIdx.x * warps + warp) * work.length);
    work.end = min(all, work.at + work.length);
    if (work.at < work.end) work.row = find(tables, before, work.at);
  } else if (blockIdx.x < all) {
    work.row = find(tables, before, blockIdx.x);
    const uint32_t tiles = work.row.tokens.tiles();
    work.block = blockIdx.x - work.row.begin;
    work.length = (tiles + work.row.count * warps - 1) / (work.row.count * warps);
    work.at = min(tiles, (work.block * warps + warp) * work.length);
    work.end = min(tiles, work.at + work.length);
  }
  return work;
}

__global__ void plan_kernel(DecodeTables tables, uint32_t least, bool many, Stretch* stretches) {
  extern __shared__ uint32_t before[];
  allow_next();
  const Stretch work = stretch_of(tables, least, many, before);  // of tables that are older than the kernel before
  wait_for_last();                                               // somebody may still read the last pass's
  if (threadIdx.x % 32 == 0) stretches[blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32] = work;
}

}  // namespace

void plan_decode(const DecodeTables& tables, const DecodeGrid& grid, int most_shared, Stretch* stretches,
                 const Stream& stream) {
  allow_shared(plan_kernel, most_shared);
  // Prefix sums, or what sort() takes.
  launch_early(stream, grid.blocks, grid.warps * 32, (2 * tables.sequences + 1) * sizeof(uint32_t), plan_kernel, tables,
               grid.least, grid.many, stretches);
}

}  // namespace gemma_cuda::cuda
