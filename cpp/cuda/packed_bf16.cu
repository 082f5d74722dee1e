// Packs bf16 (packed_bf16.h): a kernel for the largest exponent of each row, which a warp reads, then one that makes a
// slot a block, each thread the 32 elements that it will have in a product. Once a matrix, some milliseconds.
#include "cuda/check.h"
#include "cuda/packed_bf16.h"
#include "cuda/vector.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kSlotThreads = 128 * kPackedGroups;
constexpr uint32_t kHeld = 15;           // exponents that are held, from the row's largest down
constexpr uint32_t kMostExponent = 142;  // whose factor is finite

__device__ uint32_t exponent_of(uint32_t bits) { return bits >> 7 & 0xFF; }

// What the exponents 1 to 15 are counted from: 2^(the row's largest - 15), as two bf16.
__global__ void factors_kernel(const uint16_t* w, uint32_t rows, uint32_t cols, uint32_t* factors, uint32_t* failed) {
  const uint32_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  uint32_t largest = 0;
  if (row < rows)
    for (uint32_t i = threadIdx.x % 32; i < cols; i += 32)
      largest = max(largest, exponent_of(w[size_t{row} * cols + i]));
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 != 0) return;
  if (largest > kMostExponent) *failed = 1;
  factors[row] = (max(min(largest, kMostExponent), kHeld) + 127 - kHeld) * 0x00800080u;
}

struct PackedNumber {
  uint32_t byte, exponent;
  bool held;
};

__device__ PackedNumber pack(uint32_t bits, uint32_t factor) {
  const uint32_t sign = bits >> 8 & 0x80, mantissa = bits & 0x7F, exponent = exponent_of(bits);
  const int of_largest = static_cast<int>(exponent) + 127 - static_cast<int>(factor >> 7 & 0xFF);
  if (exponent > 0 && of_largest >= 1) return {sign | mantissa, static_cast<uint32_t>(of_largest), true};
  // In steps of what the exponent 0 means by the last bit of a mantissa: 2^-133 times the factor, whose logarithm is no
  // less than 0, so that numbers below what is normal are held by it, or as few of their bits as are not zero.
  const uint32_t whole = exponent > 0 ? mantissa | 0x80 : mantissa;
  const uint32_t down = (factor >> 7 & 0xFF) - 127 + 1 - max(exponent, 1u);
  if (whole == 0) return {sign, 0, true};
  if (down >= 8 || (whole & ((1u << down) - 1)) != 0) return {sign, 0, false};
  return {sign | whole >> down, 0, true};
}

__global__ void __launch_bounds__(kSlotThreads) pack_kernel(const uint16_t* w, uint32_t rows, uint32_t cols,
                                                            const uint32_t* factors, char* slots, uint32_t* failed) {
  __shared__ uint32_t counts[kSlotThreads / 32];
  const uint32_t depth = (cols + kPackedColumns - 1) / kPackedColumns;
  const uint32_t thread = threadIdx.x % 128, group = threadIdx.x / 128, warp = threadIdx.x / 32,
                 lane = threadIdx.x % 32;
  const uint32_t first_row = blockIdx.x / depth * kPackedRows + warp * 16 + lane / 4,
                 first_column = blockIdx.x % depth * kPackedColumns + lane % 4 * 2;
  // Of register r, half h: as the fragments of a product have them (mma.cuh).
  const auto number = [&](uint32_t r, uint32_t h) -> uint32_t {
    const uint32_t row = first_row + r % 2 * 8, column = first_column + r / 4 * 16 + r / 2 % 2 * 8 + h;
    return row < rows && column < cols ? w[size_t{row} * cols + column] : 0;
  };
  uint32_t bytes[8] = {}, exponents[4] = {}, exceptions = 0;
#pragma unroll
  for (uint32_t r = 0; r < 16; ++r)
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
      const PackedNumber packed = pack(number(r, h), factors[first_row + r % 2 * 8]);
      bytes[r / 4 * 2 + r % 2] |= packed.byte << (r / 2 % 2 * 16 + h * 8);
      exponents[r / 4] |= packed.exponent << (r % 4 * 4 + h * 16);
      exceptions |= (packed.held ? 0u : 1u) << (2 * r + h);
    }
  char* const slot = slots + size_t{blockIdx.x} * kPackedSlotBytes;
  uint4* const own = reinterpret_cast<uint4*>(slot + group * kPackedGroupBytes) + thread;
  own[0] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
  own[128] = make_uint4(bytes[4], bytes[5], bytes[6], bytes[7]);
  own[256] = make_uint4(exponents[0], exponents[1], exponents[2], exponents[3]);

  // Their places: behind those of the warps and lanes before.
  const uint32_t mine = __popc(exceptions);
  uint32_t before = mine;
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint32_t lower = __shfl_up_sync(~0u, before, offset);
    if (lane >= offset) before += lower;
  }
  if (lane == 31) counts[warp] = before;
  __syncthreads();
  uint32_t at = before - mine, end = 0;
  for (uint32_t i = 0; i <= warp; ++i) at += i < warp ? counts[i] : 0, end += counts[i];
  auto& list = *reinterpret_cast<PackedExceptions*>(slot + kPackedGroups * kPackedGroupBytes);
  if (end > kMostExceptions) *failed = 1, exceptions = 0;
  if (lane == 31) list.ends[warp] = static_cast<uint8_t>(min(end, kMostExceptions));
  for (; exceptions != 0; exceptions &= exceptions - 1, ++at) {
    const uint32_t which = __ffs(exceptions) - 1;
    list.list[at] = lane | which % 2 << 5 | which / 2 << 6 | number(which / 2, which % 2) << 16;
  }
}

}  // namespace

bool pack_bf16(const Matrix& w, void* to, cudaStream_t stream) {
  const uint32_t rows = packed_tiles(w) * kPackedRows;
  char* const slots = static_cast<char*>(to);
  uint32_t* const factors = reinterpret_cast<uint32_t*>(slots + packed_slots(w) * kPackedSlotBytes);
  uint32_t* const failed = factors + rows;
  const auto* from = static_cast<const uint16_t*>(w.data);
  GEMMA_CUDA_CHECK(cudaMemsetAsync(to, 0, packed_bf16_bytes(w), stream));
  factors_kernel<<<rows / 8, 256, 0, stream>>>(from, w.rows, w.cols, factors, failed);
  GEMMA_CUDA_CHECK(cudaGetLastError());
  pack_kernel<<<static_cast<uint32_t>(packed_slots(w)), kSlotThreads, 0, stream>>>(from, w.rows, w.cols, factors, slots,
                                                                                   failed);
  GEMMA_CUDA_CHECK(cudaGetLastError());
  uint32_t does_not_fit = 0;
  GEMMA_CUDA_CHECK(cudaMemcpyAsync(&does_not_fit, failed, sizeof does_not_fit, cudaMemcpyDeviceToHost, stream));
  GEMMA_CUDA_CHECK(cudaStreamSynchronize(stream));
  return does_not_fit == 0;
}

}  // namespace gemma_cuda::cuda
