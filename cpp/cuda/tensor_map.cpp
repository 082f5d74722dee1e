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

// Of a matrix seen as so many dimensions: first its columns, then parts of its rows, each with as many rows as lie
// between two of its elements.
struct Part {
  uint64_t size, step;
  uint32_t box;
};
template <size_t Parts>
CUtensorMap encode(const void* data, DType dtype, uint64_t columns, const Part (&parts)[Parts]) {
  const uint64_t size = size_of(dtype);
  cuuint64_t sizes[1 + Parts] = {columns}, steps_bytes[Parts];
  cuuint32_t box[1 + Parts] = {static_cast<cuuint32_t>(128 / size)}, steps[1 + Parts] = {1};
  uint64_t rows = 1;
  for (size_t i = 0; i < Parts; ++i) {
    sizes[1 + i] = parts[i].size, steps_bytes[i] = parts[i].step * columns * size;
    box[1 + i] = parts[i].box, steps[1 + i] = 1;
    rows *= parts[i].size;
  }
  CUtensorMap map;
  const CUresult status =
      encoder()(&map, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 1 + Parts,
                const_cast<void*>(data), sizes, steps_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw Error::device("no tensor map of a " + std::to_string(rows) + " x " + std::to_string(columns) +
                        " matrix: cuTensorMapEncodeTiled returned " + std::to_string(status));
  return map;
}

}  // namespace

CUtensorMap tensor_map(const void* data, DType dtype, uint64_t rows, uint64_t columns, uint32_t box_rows) {
  return encode(data, dtype, columns, {{rows, 1, box_rows}});
}

CUtensorMap run_map(const void* data, DType dtype, uint64_t rows, uint64_t columns, uint32_t box_rows) {
  return encode(data, dtype, columns,
                {{2, 1, 2}, {4, 8, 4}, {4, 2, 4}, {rows / kRunRows, kRunRows, box_rows / kRunRows}});
}

CUtensorMap pair_map(const void* data, DType dtype, uint64_t rows, uint64_t columns, uint32_t box_rows) {
  return encode(
      data, dtype, columns,
      {{kPairRows, 1, kPairRows}, {2, rows / 2, 2}, {rows / (2 * kPairRows), kPairRows, box_rows / (2 * kPairRows)}});
}

}  // namespace gemma_cuda::cuda
