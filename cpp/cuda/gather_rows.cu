// to[i] = from[rows[i]]: one block a row, 16 bytes a thread and turn. Of few rows, so that it is bound by its launch.
#include "cuda/check.h"
#include "cuda/ops.h"

namespace gemma_cuda::cuda {
namespace {

__global__ void gather_rows_kernel(const uint4* from, const uint32_t* rows, uint64_t width, uint4* to) {
  const uint4* row = from + rows[blockIdx.x] * width;
  for (uint64_t i = threadIdx.x; i < width; i += blockDim.x) to[blockIdx.x * width + i] = row[i];
}

}  // namespace

void gather_rows(const GatherArgs& args, cudaStream_t stream) {
  if (args.count == 0) return;
  if (args.row_bytes % sizeof(uint4) != 0)
    throw Error::invalid_argument("rows of " + std::to_string(args.row_bytes) + " bytes are not of whole 16");
  gather_rows_kernel<<<args.count, 256, 0, stream>>>(static_cast<const uint4*>(args.from), args.rows,
                                                     args.row_bytes / sizeof(uint4), static_cast<uint4*>(args.to));
  GEMMA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace gemma_cuda::cuda
