// How products of few rows share their work among blocks (skinny_gemm.cu), and the sums that this leaves, of which each
// block has a part.
#pragma once

#include <cstdint>

namespace gemma_cuda::cuda {

// Divides by a number that the host knows: on the device a division is some twenty instructions, which every layer
// reads anew. Exact for n whose product with the divisor is below 2^31.
struct Divisor {
  uint32_t factor = 1u << 31;  // 2^31 over the divisor, rounded up

  Divisor() = default;
  explicit Divisor(uint32_t by) : factor(static_cast<uint32_t>(((uint64_t{1} << 31) + by - 1) / by)) {}
};

// Tiles of so many slots each: all slots, in order, are cut into a run a block. The first `longer` ones have one slot
// more than the others.
struct Cut {
  uint32_t tiles = 0, depth = 1, blocks = 1;
  uint32_t run = 0, longer = 0;
  Divisor by_depth, by_run, by_longer_run;

  Cut() = default;
  Cut(uint32_t tiles, uint32_t depth, uint32_t blocks)
      : tiles(tiles),
        depth(depth),
        blocks(blocks),
        run(tiles * depth / blocks),
        longer(tiles * depth % blocks),
        by_depth(depth),
        by_run(run > 0 ? run : 1),
        by_longer_run(run + 1) {}
};

constexpr uint32_t kPartRows = 128;  // of w, in a tile

// Of a tile a block can have the end, in its place 0, or the beginning, in its place 1.
struct ProductParts {
  Cut cut;
  const float* sums = nullptr;      // [blocks][2 places][capacity][kPartRows]
  uint32_t capacity = 0;            // tokens
  const float* w_scales = nullptr;  // FP8: as SkinnyGemm has them
  const float* x_scales = nullptr;
  bool one_x_scale = false;
  bool fresh = false;  // whether w and its scales have just been written
};

}  // namespace gemma_cuda::cuda
