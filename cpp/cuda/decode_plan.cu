// Cuts the tiles of a step's keys and values into a stretch a warp (decode_plan.cuh). One block for each that attention
// will have, all of which lay the sequences out for themselves; some us, once a pass.
#include "cuda/decode_plan.cuh"
#include "cuda/launch.cuh"

namespace gemma_cuda::cuda {
namespace {

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

__device__ Stretch stretch_of(const DecodeTables& tables, uint32_t least, bool many, uint32_t* before) {
  const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32;
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
  launch_early(stream, grid.blocks, grid.warps * 32, (tables.sequences + 1) * sizeof(uint32_t), plan_kernel, tables,
               grid.least, grid.many, stretches);
}

}  // namespace gemma_cuda::cuda
