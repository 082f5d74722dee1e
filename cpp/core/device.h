// Which backend runs a model.
#pragma once

#include <memory>

#include "core/engine.h"
#include "core/spec.h"
#include "ops/backend.h"

namespace gemma_cuda {

// For options.device: "auto" (the first GPU if the model can run there, or the CPU), "reference" or "cuda:N". Throws
// Error::device saying why a device that was asked for cannot be had.
std::unique_ptr<Backend> make_backend(const ModelSpec& spec, const EngineOptions& options);

}  // namespace gemma_cuda
