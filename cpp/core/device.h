// Which backend runs a model.
#pragma once

#include <memory>
#include <string>

#include "core/engine.h"
#include "core/spec.h"
#include "ops/backend.h"

namespace gemma_cuda {

struct Device {
  std::unique_ptr<Backend> backend;
  std::string why;  // "auto" took the CPU in a build that knows GPUs; empty otherwise
};

// For options.device: "auto" (the first GPU if the model can run there, or the CPU), "reference" or "cuda:N". Throws
// Error::device saying why a device that was asked for cannot be had.
Device make_device(const ModelSpec& spec, const EngineOptions& options);

// Whether this build has the CUDA backend; how many GPUs this process may use, 0 where it has not.
bool has_cuda();
uint32_t gpu_count();
// Throws Error::device saying why the GPU cannot be used, or not for FP8.
void require_gpu(uint32_t index, bool fp8);

// What that device's operations will need for themselves. Where "cuda:N" is not there, that of a common GPU.
uint64_t workspace_bytes(const ModelSpec& spec, const EngineOptions& options);

}  // namespace gemma_cuda
