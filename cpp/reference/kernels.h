// The reference backend's inner loops, one table of them for each instruction set.
//
// Every table comes from kernels.inl, compiled for that set; the best one the processor has is taken at run time.
// Within a table a result never depends on how many rows share a call, so batching and chunking change no bit.
#pragma once

#include <span>

#include "ops/backend.h"
#include "ops/convert.h"

namespace gemma_cuda::reference {

constexpr uint32_t kGemmBlock = 32;  // columns

struct Kernels {
  const char* name;
  // Columns [begin, end) of out, for every row. For FP8, `scratch` has room for [tokens + kGemmBlock, k].
  void (*gemm)(const GemmArgs& args, DType act, uint32_t begin, uint32_t end, bf16* scratch);
  void (*norm_row)(const NormArgs& args, DType act, uint32_t row);
  void (*rope_row)(const RopeArgs& args, DType act, uint32_t row);
  // One head of one new token, which sees positions [first, last]; `scores` has room for one float a position and 4.
  void (*attend)(const AttentionArgs& args, DType act, uint32_t row, uint32_t sequence, uint32_t head, uint32_t first,
                 uint32_t last, float* scores);
  void (*geglu_row)(const GegluArgs& args, DType act, uint32_t row);
  void (*quantize_row)(const QuantizeArgs& args, uint32_t row);
  void (*soft_cap)(float* x, size_t count, float cap);
  float (*max)(const float* x, size_t count);  // NaN if any is
  // sum of exp(x - max)
  double (*sum_exp)(const float* x, size_t count, float max);
};

const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
#endif

// Those this processor can run, slowest first.
std::span<const Kernels* const> usable_kernels();

}  // namespace gemma_cuda::reference
