// out = x w^T for the few rows of decode, where the time is the time to read w once.
#pragma once

#include <cstddef>

#include "cuda/ops.h"
#include "cuda/product_parts.h"
#include "cuda/survey.h"

namespace gemma_cuda::cuda {

constexpr uint32_t kSkinnyTokens = 64;  // at most

// Whether skinny_gemm() has a kernel for the device and the product.
bool skinny_gemm_fits(const GemmArgs& args, const DeviceInfo& device);

// `partials` holds skinny_partial_bytes(), whatever is in them; `arrivals` kSkinnyArrivalBytes of zeros, and has zeros
// again afterwards. Both are used by one stream at a time.
void skinny_gemm(const GemmArgs& args, const DeviceInfo& device, void* partials, uint32_t* arrivals,
                 const Stream& stream);
// The same, but its sums stay in `partials`, as long as they are not used for anything else, for norm() to add.
bool skinny_gemm_leaves_parts(const GemmArgs& args, const DeviceInfo& device);
ProductParts skinny_gemm_in_parts(const GemmArgs& args, const DeviceInfo& device, void* partials, const Stream& stream);
// Gate, up and GeGLU in one.
bool skinny_gated_gemm_fits(const GatedGemmArgs& args, const DeviceInfo& device);
void skinny_gated_gemm(const GatedGemmArgs& args, const DeviceInfo& device, void* partials, uint32_t* arrivals,
                       const Stream& stream);
// Logits, soft-capped where that is not 0, and what sample() needs to know of their rows, which goes to `surveys`, of
// which there are skinny_surveys(). Rows of tasks that only pick the likeliest token are not written.
// Where the vocabulary is packed (packed_bf16.h) that is read.
bool skinny_surveyed_gemm_fits(const GemmArgs& args, const DeviceInfo& device);
Surveys skinny_surveyed_gemm(const GemmArgs& args, float soft_cap, const SampleArgs& sample, Survey* surveys,
                             const DeviceInfo& device, void* partials, uint32_t* arrivals, const Stream& stream);
bool skinny_gemm_reads_packed(const Matrix& vocabulary, const DeviceInfo& device);
inline size_t skinny_surveys(uint32_t tokens, const DeviceInfo& device) {
  return size_t{tokens} * device.multiprocessors;
}
size_t skinny_partial_bytes(const DeviceInfo& device);
constexpr size_t kSkinnyArrivalBytes = size_t{64} << 10;

}  // namespace gemma_cuda::cuda
