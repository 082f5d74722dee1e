// Matrices to FP8 on the host, for checkpoints.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/convert.h"
#include "ops/dtype.h"

namespace gemma_cuda {

// Row-major `bytes` of this type, each element divided by its row's scale (as many rows as scales), to nearest even and
// saturating. Throws Error::invalid_argument for scales that are not positive and finite or do not divide the elements.
std::vector<e4m3> quantize_rows(DType dtype, std::span<const uint8_t> bytes, std::span<const float> scales);

}  // namespace gemma_cuda
