// A matrix of bf16 in three quarters of its bytes and without loss, for products of few rows, which take the time to
// read it (skinny_gemm.cu). Weights hardly use the eight bits of their exponents: in a row nearly all are within a
// factor of 2^15 of the largest. So an element is a byte of sign and mantissa and four bits of exponent, counted
// from the row's, and the few that this does not hold are listed beside the others. What is multiplied with is the very
// numbers that were packed.
//
// Bytes are in the order in which the threads of the product take them, in slots of 256 rows and 64 columns, which one
// copy brings: for each warpgroup (64 rows) the signs and mantissas, 2 x 128 threads x 16 bytes, and the exponents,
// 128 x 16; then, for all, the exceptions. Behind all slots [tiles][columns / 64], the factors of the rows, and
// whether something did not fit.
//
// An exponent of 1 to 15 stands for 14 to 0 below the row's largest. 0 stands for what bf16 means by it, no leading
// one: so zeros are held, and small numbers that are multiples of the smallest step, as in models trained for few bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/ops.h"

namespace gemma_cuda::cuda {

constexpr uint32_t kPackedGroups = 4, kPackedRows = 64 * kPackedGroups, kPackedColumns = 64;  // of a slot
constexpr uint32_t kPackedGroupBytes = 64 * 64 * 3 / 2;
constexpr uint32_t kMostExceptions = 60;  // of a slot: 0.4 % of its elements

// Which of a thread's numbers is another, and which: bits 0-4 its lane, 5 the half of its register, 6-9 the register,
// 16-31 the number. Those of warp w come behind those of warp w - 1 and end at ends[w].
struct PackedExceptions {
  uint8_t ends[4 * kPackedGroups];
  uint32_t list[kMostExceptions];
};
constexpr uint32_t kPackedSlotBytes = kPackedGroups * kPackedGroupBytes + sizeof(PackedExceptions);
static_assert(kPackedSlotBytes % 16 == 0);

inline uint32_t packed_tiles(const Matrix& w) { return (w.rows + kPackedRows - 1) / kPackedRows; }
inline size_t packed_slots(const Matrix& w) {
  return size_t{packed_tiles(w)} * ((w.cols + kPackedColumns - 1) / kPackedColumns);
}
// A factor is two halves alike: what a row's two neighbours are multiplied by.
inline const uint32_t* packed_factors(const Matrix& w) {
  return reinterpret_cast<const uint32_t*>(static_cast<const char*>(w.packed) + packed_slots(w) * kPackedSlotBytes);
}
inline size_t packed_bf16_bytes(const Matrix& w) {
  return packed_slots(w) * kPackedSlotBytes + (size_t{packed_tiles(w)} * kPackedRows + 1) * sizeof(uint32_t);
}

// Packs w, of bf16, to packed_bf16_bytes(), and waits for it. Returns false, and leaves something else there, if a slot
// has more exceptions than it holds, or a row has numbers of 2^16 and more.
bool pack_bf16(const Matrix& w, void* to, cudaStream_t stream);

}  // namespace gemma_cuda::cuda
