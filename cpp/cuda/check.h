// CUDA's error codes as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/error.h"

namespace gemma_cuda::cuda {

// Throws naming the call that failed. A fault of a kernel shows at a later call and at every one after it.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw Error::device(std::string(call) + " failed: " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                      ")");
}

}  // namespace gemma_cuda::cuda

#define GEMMA_CUDA_CHECK(call) ::gemma_cuda::cuda::check((call), #call)
