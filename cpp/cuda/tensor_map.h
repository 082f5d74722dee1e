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

// The same, but with the rows of every run of kRunRows in such an order that a thread of a warpgroup product
// (wgmma.cuh), of which they are the columns, has eight that follow each other in four fragments: row 8 c + 2 i + j of
// the matrix is row 8 i + 2 c + j of the run, i being the fragment and c what threads call lane % 4. `rows` and
// `box_rows` are multiples of kRunRows.
constexpr uint32_t kRunRows = 32;
CUtensorMap run_map(const void* data, DType dtype, uint64_t rows, uint64_t columns, uint32_t box_rows);

// The same, but with the rows of both halves of the matrix by turns, kPairRows of the first, then those of the second:
// box row 16 i + j, j < 8, is row 8 i + j of the matrix, and box row 16 i + 8 + j the same of its second half. `rows`
// and `box_rows` are multiples of twice kPairRows.
constexpr uint32_t kPairRows = 8;
CUtensorMap pair_map(const void* data, DType dtype, uint64_t rows, uint64_t columns, uint32_t box_rows);

// Whether a matrix may begin here, or a tensor copy.
inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace gemma_cuda::cuda
