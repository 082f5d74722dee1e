// Tensor maps: how the copy engine of sm_90 finds boxes of a matrix.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace gemma_cuda::cuda {

// Of a row-major bf16 matrix whose boxes are so many rows of 64 columns, laid out in shared memory as the tensor cores
// want them (wgmma.cuh); what lies outside the matrix reads as zeros. `data` is at a multiple of 16 bytes, `columns` a
// multiple of 8, `box_rows` at most 256.
CUtensorMap tensor_map(const void* data, uint64_t rows, uint64_t columns, uint32_t box_rows);

}  // namespace gemma_cuda::cuda
