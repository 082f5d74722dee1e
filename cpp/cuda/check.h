// CUDA's error codes as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/error.h"

namespace gemma_cuda::cuda {

// Errors after which every call of the process to this GPU fails.
constexpr bool outlives_the_call(cudaError_t status) {
  switch (status) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable: return true;
    default: return false;
  }
}

// Throws naming the call that failed. A fault of a kernel shows at a later call and at every one after it.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is told here; a later launch must not see it again
  throw Error::device(
      std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ", seen by " + call + ")" +
      (outlives_the_call(status) ? "; after this, the process cannot use that GPU again: start a new one" : ""));
}

}  // namespace gemma_cuda::cuda

#define GEMMA_CUDA_CHECK(call) ::gemma_cuda::cuda::check((call), #call)
