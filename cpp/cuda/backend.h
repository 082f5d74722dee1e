// The CUDA backend: one GPU, one stream (and one for what may run beside it), bf16 activations and weights.
#pragma once

#include <memory>
#include <string>

#include "ops/backend.h"

namespace gemma_cuda::cuda {

// Throws Error::device saying why the GPU cannot be used: no driver, no such device, older than sm_80, or than sm_89
// where FP8 is asked for, no cuBLASLt.
std::unique_ptr<Backend> make_backend(int device, bool fp8 = false);

// GPUs that this process may use; 0 where there is no driver.
int devices();

// What the backend of this GPU takes in reserve(); where it is not there, that of an H100.
uint64_t workspace_bytes(int device, const WorkLimits& limits);

// Why the operations have no kernels for such heads; empty if they have.
std::string unsupported_head(uint32_t head_dim, uint32_t heads, uint32_t kv_heads);

}  // namespace gemma_cuda::cuda
