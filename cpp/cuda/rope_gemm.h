// q, k, v = x w^T, normed where the model does, rotated, and k and v in the cache's pages, in one kernel, for the many
// tokens of prefill: the products are never written.
#pragma once

#include "cuda/ops.h"

namespace gemma_cuda::cuda {

// Whether rope_gemm() has a kernel for the device and the product: of more than kSkinnyTokens (skinny_gemm.h), with
// heads of 128 or 256, `product.out` being `rope.qkv`, which it does not use.
bool rope_gemm_runs(const GemmArgs& product, const RopeArgs& rope, const DeviceInfo& device);
// Whether it also has work enough to be faster than the two by themselves.
bool rope_gemm_fits(const GemmArgs& product, const RopeArgs& rope, const DeviceInfo& device);
void rope_gemm(const GemmArgs& product, const RopeArgs& rope, const DeviceInfo& device, const Stream& stream);

}  // namespace gemma_cuda::cuda
