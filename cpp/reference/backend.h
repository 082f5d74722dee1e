// The reference backend with its instruction set chosen by hand, as the tests do.
#pragma once

#include <memory>

#include "ops/backend.h"
#include "reference/kernels.h"

namespace gemma_cuda::reference {

std::unique_ptr<Backend> make_backend(uint32_t threads, const Kernels& kernels, DType act);

}  // namespace gemma_cuda::reference
