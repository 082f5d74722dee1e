// out = gelu_tanh(x gate^T) * (x up^T) in one kernel, for the many tokens of prefill, where the tensor cores' time is
// what counts.
#pragma once

#include "cuda/ops.h"

namespace gemma_cuda::cuda {

// Whether gated_gemm() has a kernel for the device and the product: of more than kSkinnyTokens (skinny_gemm.h), for
// with fewer GeGLU costs nothing behind a product, while the next product fetches its weights.
bool gated_gemm_fits(const GatedGemmArgs& args, const DeviceInfo& device);
void gated_gemm(const GatedGemmArgs& args, const DeviceInfo& device, const Stream& stream);

}  // namespace gemma_cuda::cuda
