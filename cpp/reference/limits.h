// Sizes the reference kernels keep on the stack.
#pragma once

#include <cstdint>

namespace gemma_cuda::reference {

constexpr uint32_t kMaxHeadDim = 4096;  // as core/spec.cpp allows

}  // namespace gemma_cuda::reference
