// Any processor: four lanes, which every 64-bit machine has.
#include <cmath>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "ops/convert.h"
#include "reference/kernels.h"
#include "reference/limits.h"

namespace gemma_cuda::reference {
namespace {

typedef float vf __attribute__((vector_size(16)));
inline vf fma(vf a, vf b, vf c) { return a * b + c; }

#include "reference/kernels.inl"

}  // namespace

const Kernels& generic_kernels() {
  static constexpr Kernels kernels{"generic", gemm,         norm_row, rope_row, attend,
                                   geglu_row, quantize_row, soft_cap, max,      sum_exp};
  return kernels;
}

}  // namespace gemma_cuda::reference
