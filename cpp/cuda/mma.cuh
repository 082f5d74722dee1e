// Tensor core building blocks for attention, for every GPU from sm_80 on: fragments of bf16 and f16, asynchronous
// 16-byte copies, and tiles of K or V rows in shared memory.
//
// Fragments of mma.m16n8k16 (r = lane / 4, c = lane % 4): A holds rows r and r + 8, columns 2c, 2c + 1 and those + 8; B
// holds column r, rows 2c, 2c + 1 and those + 8; C holds rows r and r + 8, columns 2c and 2c + 1. So a C of scores is,
// narrowed, the A of the next product: probabilities never leave registers.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/vector.cuh"

namespace gemma_cuda::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// So many bytes of shared memory at a time.
template <int Bytes>
struct Words {
  uint32_t word[(Bytes + 3) / 4];
  __device__ explicit Words(uint32_t address) {
    if constexpr (Bytes == 16)
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                   : "r"(address)
                   : "memory");
    else if constexpr (Bytes == 8)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(address) : "memory");
    else if constexpr (Bytes == 4)
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word[0]) : "r"(address) : "memory");
    else
      asm volatile("{.reg .u16 half; ld.shared.u16 half, [%1]; cvt.u32.u16 %0, half;}"
                   : "=r"(word[0])
                   : "r"(address)
                   : "memory");
  }
};

// Copies 16 bytes to shared memory, or zeroes them where there is nothing to copy.
__device__ inline void copy_async(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of the committed groups are under way.
template <int N>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// What the inputs of a product are. Keys and values in FP8 are computed with as f16, which holds all of E4M3 and is one
// instruction away from it; queries then become f16 too, exactly so between 2^-14 and 65504.
struct Bf16 {
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ static uint32_t of_bf16(uint32_t pair) { return pair; }
};
struct F16 {
  __device__ static uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ static uint32_t of_bf16(uint32_t pair) {
    constexpr float kLargest = 65504;
    const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xFFFF0000);
    return pack(fminf(fmaxf(low, -kLargest), kLargest), fminf(fmaxf(high, -kLargest), kLargest));
  }
  // Of two E4M3 in the low half of `pair`.
  __device__ static uint32_t of_e4m3(uint32_t pair) {
    const __half2_raw wide = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
    return wide.x | uint32_t{wide.y} << 16;
  }
};
struct E4m3 {};

// d += a b
__device__ inline void mma(Bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(F16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// An 8x8 matrix of 16 bits, transposed: a lane has two neighbours of row lane / 4.
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(pair));
  return to;
}

// 2^x to within two units in the last place; 0 where that is below 2^-126.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rows of so many bytes in shared memory. Their 16-byte chunks are stored at chunk ^ (row % 8), so that eight rows of
// one column of chunks lie in eight different groups of banks.
template <int RowBytes>
struct SwizzledRows {
  static constexpr int kRowBytes = RowBytes;
  static constexpr int kChunks = RowBytes / 16;
  static constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7;

  __device__ static uint32_t chunk(uint32_t base, int row, int chunk) {
    return base + row * kRowBytes + ((chunk ^ (row & kMask)) << 4);
  }
};

// Rows of HeadDim elements of 16 bits.
template <int HeadDim>
struct Tile : SwizzledRows<2 * HeadDim> {
  using SwizzledRows<2 * HeadDim>::chunk;
  // The B fragments of 16 rows by 16 columns, rows being the product's columns (K): {rows 0-7: b0, b1; rows 8-15: …}.
  __device__ static void columns(uint32_t (&b)[4], uint32_t base, int row, int column, int lane) {
    load_matrices(b, chunk(base, row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
  }
  // The B fragments of 16 rows by 16 columns, rows being the inner dimension (V): {columns 0-7: b0, b1; 8-15: …}.
  __device__ static void rows(uint32_t (&b)[4], uint32_t base, int row, int column, int lane) {
    load_matrices_transposed(b, chunk(base, row + lane % 16, column / 8 + lane / 16));
  }
};

// Scores of a query, in log2 units: exp2 of them is the softmax's numerator.
struct ScoreScale {
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale;  // with log2(e); of tanh twice that
  float cap;    // with log2(e); 0: none
  __host__ __device__ static ScoreScale of(float scale, float soft_cap) {
    return soft_cap > 0 ? ScoreScale{2 * kLog2e * scale / soft_cap, soft_cap * kLog2e} : ScoreScale{scale * kLog2e, 0};
  }
  // cap tanh(x) by one exponential, of 2 x: within 1e-6 cap, and without a branch.
  __device__ float capped(float product) const { return cap * (1 - __fdividef(2, 1 + fast_exp2(product * scale))); }
  __device__ float operator()(float product) const { return cap > 0 ? capped(product) : product * scale; }
};

}  // namespace gemma_cuda::cuda
