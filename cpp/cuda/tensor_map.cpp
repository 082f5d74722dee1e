#include "cuda/tensor_map.h"

#include <cuda_runtime.h>

#include "cuda/check.h"

namespace gemma_cuda::cuda {
namespace {

// Of the driver, which is not linked: a program must start without one.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    GEMMA_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || function == nullptr)
      throw Error::device("the NVIDIA driver has no cuTensorMapEncodeTiled; install one for CUDA 12 or newer");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

}  // namespace

CUtensorMap tensor_map(const void* data, DType dtype, uint64_t rows, uint64_t columns, uint32_t box_rows) {
  const uint64_t size = size_of(dtype);
  const cuuint64_t sizes[] = {columns, rows}, row_bytes[] = {columns * size};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / size), box_rows}, steps[] = {1, 1};
  CUtensorMap map;
  const CUresult status =
      encoder()(&map, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                const_cast<void*>(data), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw Error::device("no tensor map of a " + std::to_string(rows) + " x " + std::to_string(columns) +
                        " matrix: cuTensorMapEncodeTiled returned " + std::to_string(status));
  return map;
}

}  // namespace gemma_cuda::cuda
