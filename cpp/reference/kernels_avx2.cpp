// x86-64 with AVX2 and FMA (2013 on): eight lanes.
#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>

#include "ops/convert.h"
#include "reference/kernels.h"
#include "reference/limits.h"

// To the end of the file: templates are compiled where they are used.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace gemma_cuda::reference {
namespace {

typedef __m256 vf;
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

#include "reference/kernels.inl"

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels{"avx2",    gemm,         norm_row, rope_row, attend,
                                   geglu_row, quantize_row, soft_cap, max,      sum_exp};
  return kernels;
}

}  // namespace gemma_cuda::reference

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
