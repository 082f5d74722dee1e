// How products of few rows share their work among blocks (skinny_gemm.cu), and the sums that this leaves, of which each
// block has a part.
#pragma once

#include <cstdint>

namespace gemma_cuda::cuda {

// Tiles of so many slots each: all slots, in order, are cut into an even run a block.
struct Cut {
  uint32_t tiles = 0, depth = 0, blocks = 0;
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
