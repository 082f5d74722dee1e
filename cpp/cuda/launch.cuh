// Kernel launches that overlap with the end of the kernel before (programmatic dependent launch, sm_90 and up): the
// next kernel's blocks start while the last ones still run, and wait inside for their results.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/ops.h"

namespace gemma_cuda::cuda {

// First in a kernel: lets the next one start its blocks, which cost this one nothing until they do something.
__device__ inline void allow_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Before a kernel touches what kernels before it write or read: waits until they have ended.
__device__ inline void wait_for_last() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Lets a kernel have so much dynamic shared memory. That belongs to the process: it must not depend on what one launch
// takes, for another engine's thread may be about to launch the kernel with more.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), int most) {
  GEMMA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// Whether a kernel that has static shared memory was compiled with its body, which may be for one architecture only.
template <class... Parameters>
bool has_body(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  GEMMA_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.sharedSizeBytes > 0;
}

// For kernels that call wait_for_last(), as every thread must before its first access.
template <class... Parameters, class... Arguments>
void launch_early(const Stream& stream, dim3 grid, dim3 block, size_t shared, void (*kernel)(Parameters...),
                  Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream.stream;
  config.attrs = &attribute;
  config.numAttrs = stream.overlaps ? 1 : 0;
  GEMMA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace gemma_cuda::cuda
