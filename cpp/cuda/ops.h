// The kernels' launchers: one an operation of ops/backend.h, each in the file of its name. Activations are bf16.
#pragma once

#include <cuda_runtime.h>

#include "cuda/product_parts.h"
#include "ops/backend.h"

namespace gemma_cuda::cuda {

// What a launcher needs to know of the device.
struct DeviceInfo {
  int index = 0;
  int multiprocessors = 0;
  int shared_memory = 0;  // bytes a block may have
  int capability = 0;     // 10 * major + minor
};

// Where a kernel goes.
struct Stream {
  cudaStream_t stream = nullptr;
  bool overlaps = false;  // whether a kernel may start at the end of the one before (launch.cuh)
};

void embed(const EmbedArgs& args, cudaStream_t stream);
void gather_rows(const GatherArgs& args, cudaStream_t stream);
void norm(const NormArgs& args, const Stream& stream);
// Its delta is the sum of these parts.
void norm(const NormArgs& args, const ProductParts& delta, const Stream& stream);
void rope(const RopeArgs& args, const DeviceInfo& device, const Stream& stream);
void geglu(const GegluArgs& args, const Stream& stream);
void soft_cap(const SoftCapArgs& args, const Stream& stream);
void quantize(const QuantizeArgs& args, const Stream& stream);
// to[i] = *scale
void fill_scales(float* to, const float* scale, uint32_t count, cudaStream_t stream);
// out[i][j] *= the scale of x's row i * that of w's row j: what a product of FP8 still lacks.
void scale_product(const GemmArgs& args, const Stream& stream);
void observe(const ObserveArgs& args, const Stream& stream);
void observe_cache(const ObserveCacheArgs& args, const Stream& stream);
// Between the device's memory and the host's pinned memory, either way.
void copy_pinned(void* to, const void* from, size_t bytes, cudaStream_t stream);
// to[i] = from[i], between f32, bf16 and f16, rounded to nearest even.
void convert(void* to, DType to_type, const void* from, DType from_type, size_t count, cudaStream_t stream);
void fill_random(void* to, DType type, size_t count, uint64_t seed, float deviation, cudaStream_t stream);

// Sequences with several new tokens.
void prefill_attention(const AttentionArgs& args, const DeviceInfo& device, const Stream& stream);
// Sequences with one new token, by a plan that plan_decode_attention() has made for the same tables, cache, heads and
// window in decode_plan_bytes(); behind that launch this one must not overlap. `scratch` holds decode_scratch_bytes(),
// whatever is in them; `arrivals` decode_arrival_bytes() of zeros, and has zeros again when it is done.
void plan_decode_attention(const AttentionArgs& args, const DeviceInfo& device, void* plan, const Stream& stream);
void decode_attention(const AttentionArgs& args, const DeviceInfo& device, const void* plan, void* scratch,
                      uint32_t* arrivals, const Stream& stream);
size_t decode_plan_bytes(const DeviceInfo& device);
size_t decode_arrival_bytes(const DeviceInfo& device);
size_t decode_scratch_bytes(const DeviceInfo& device, uint32_t head_dim, uint32_t group);

// Widths of a head for which there are attention kernels.
constexpr bool head_dim_supported(uint32_t head_dim) {
  return head_dim == 16 || head_dim == 32 || head_dim == 64 || head_dim == 128 || head_dim == 256;
}
constexpr uint32_t kMaxGroup = 16;  // query heads that share a K/V head

}  // namespace gemma_cuda::cuda
