// A GPU for a test, or a clear word that there is none.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "core/error.h"
#include "cuda/backend.h"

namespace test {

// Ends the test where there is no usable GPU: as skipped (77, as ctest knows it), or as failed where
// GEMMA_CUDA_REQUIRE_GPU is set.
inline std::unique_ptr<gemma_cuda::Backend> gpu() {
  try {
    return gemma_cuda::cuda::make_backend(0);
  } catch (const gemma_cuda::Error& error) {
    std::fprintf(stderr, "*** NOT RUN: %s ***\n", error.what());
    std::exit(std::getenv("GEMMA_CUDA_REQUIRE_GPU") ? 1 : 77);
  }
}

}  // namespace test
