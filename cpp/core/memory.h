// Whether an engine has room on its device, before any of it is taken.
#pragma once

#include "core/engine.h"
#include "core/spec.h"
#include "ops/backend.h"

namespace gemma_cuda {

// What the operations will be asked at most.
WorkLimits work_limits(const ModelSpec& spec, const EngineOptions& options);

// Throws Error::device with the numbers, and the nearest smaller options that would fit, where the backend knows what
// it has and that is too little.
void require_room(const ModelSpec& spec, const EngineOptions& options, const Backend& backend);

}  // namespace gemma_cuda
