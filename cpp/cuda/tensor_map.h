// Tensor maps: how the copy engine of sm_90 finds boxes of a matrix.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ops/dtype.h"

namespace gemma_cuda::cuda {

// Of a row-major matrix, bf16 or e4m3, whose boxes are so many rows of 128 bytes, laid out in shared memory as the
// tensor cores want them (wgmma.cuh); what lies outside the matrix reads as zeros. `data` is at a multiple of 16 bytes,
// as each row is, `box_rows` at most 256.
CUtensorMap tensor_map(const void* data, DType dtype, uint64_t rows, uint64_t columns, uint32_t box_rows);

}  // namespace gemma_cuda::cuda
