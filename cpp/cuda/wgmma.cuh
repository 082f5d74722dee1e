// Warpgroup products of sm_90a (wgmma): 64 rows by N columns by 32 bytes, a warpgroup of 128 threads together, run
// while the threads go on. Operands lie in shared memory in blocks of 128 bytes a row, whose 16-byte chunks are at
// chunk ^ (row % 8); a block begins at a multiple of 1024 bytes. Results have the fragments of mma.cuh, each warp 16 of
// the rows. To be used only where __CUDA_ARCH_FEAT_SM90_ALL is defined.
#pragma once

#include <cstdint>

#include "cuda/mma.cuh"

namespace gemma_cuda::cuda {

// Where an operand is: its first byte, and the bytes from eight rows to the next eight, and, where the product runs
// along the rows (values), from one block of columns to the next.
__device__ inline uint64_t operand(uint32_t address, uint32_t block_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = 1024;
  return kSwizzle128 | kEightRows >> 4 << 32 | uint64_t{block_bytes >> 4} << 16 | (address & 0x3ffff) >> 4;
}

// An operand so many bytes behind another of its kind. Only its lower half is computed with.
__device__ inline uint64_t further(uint64_t operand, uint32_t bytes) {
  return operand >> 32 << 32 | (static_cast<uint32_t>(operand) + (bytes >> 4));
}

// Before the first product, and whenever registers of one were touched.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N of the committed groups are under way.
template <int N>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving accesses of a product's registers over this point.
template <int N>
__device__ inline void pin(float (&d)[N][4]) {
#pragma unroll
  for (auto& fragment : d)
#pragma unroll
    for (float& x : fragment) asm volatile("" : "+f"(x)::"memory");
}

// Makes what ordinary instructions and cp.async wrote to shared memory visible to the tensor cores.
__device__ inline void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int Registers>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// multiply_columns: d (+)= a b^T, both along their columns, b in shared memory, a there or in registers. multiply_rows:
// d += a b, a in registers, b's rows being the inner dimension. `keep` false: d is overwritten. The first argument says
// what a and b are; sums are float32, but of E4M3 the tensor cores keep only some 14 bits while they add.
#define GEMMA_CUDA_D4 "%0, %1, %2, %3"
#define GEMMA_CUDA_D8 \
  GEMMA_CUDA_D4       \
  ", "                \
  "%4, %5, %6, %7"
#define GEMMA_CUDA_D16 \
  GEMMA_CUDA_D8        \
  ", "                 \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define GEMMA_CUDA_D32 \
  GEMMA_CUDA_D16       \
  ", "                 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GEMMA_CUDA_D64                                                               \
  GEMMA_CUDA_D32                                                                     \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GEMMA_CUDA_D128                                                                          \
  GEMMA_CUDA_D64                                                                                 \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define GEMMA_CUDA_FRAGMENT(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define GEMMA_CUDA_F1 GEMMA_CUDA_FRAGMENT(0)
#define GEMMA_CUDA_F2 GEMMA_CUDA_F1, GEMMA_CUDA_FRAGMENT(1)
#define GEMMA_CUDA_F4 GEMMA_CUDA_F2, GEMMA_CUDA_FRAGMENT(2), GEMMA_CUDA_FRAGMENT(3)
#define GEMMA_CUDA_F8 \
  GEMMA_CUDA_F4, GEMMA_CUDA_FRAGMENT(4), GEMMA_CUDA_FRAGMENT(5), GEMMA_CUDA_FRAGMENT(6), GEMMA_CUDA_FRAGMENT(7)
#define GEMMA_CUDA_F16                                                                                             \
  GEMMA_CUDA_F8, GEMMA_CUDA_FRAGMENT(8), GEMMA_CUDA_FRAGMENT(9), GEMMA_CUDA_FRAGMENT(10), GEMMA_CUDA_FRAGMENT(11), \
      GEMMA_CUDA_FRAGMENT(12), GEMMA_CUDA_FRAGMENT(13), GEMMA_CUDA_FRAGMENT(14), GEMMA_CUDA_FRAGMENT(15)
#define GEMMA_CUDA_F32                                                                                                \
  GEMMA_CUDA_F16, GEMMA_CUDA_FRAGMENT(16), GEMMA_CUDA_FRAGMENT(17), GEMMA_CUDA_FRAGMENT(18), GEMMA_CUDA_FRAGMENT(19), \
      GEMMA_CUDA_FRAGMENT(20), GEMMA_CUDA_FRAGMENT(21), GEMMA_CUDA_FRAGMENT(22), GEMMA_CUDA_FRAGMENT(23),             \
      GEMMA_CUDA_FRAGMENT(24), GEMMA_CUDA_FRAGMENT(25), GEMMA_CUDA_FRAGMENT(26), GEMMA_CUDA_FRAGMENT(27),             \
      GEMMA_CUDA_FRAGMENT(28), GEMMA_CUDA_FRAGMENT(29), GEMMA_CUDA_FRAGMENT(30), GEMMA_CUDA_FRAGMENT(31)

#define GEMMA_CUDA_COLUMNS(Type, n, k, types, tail, a_at, b_at, keep_at, registers, fragments)                     \
  __device__ inline void multiply_columns(Type, float(&d)[n / 8][4], uint64_t a, uint64_t b, bool keep) {          \
    asm volatile("{.reg .pred keep; setp.ne.b32 keep, " keep_at ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k" #k \
                 ".f32." types " {" registers "}, " a_at ", " b_at ", keep, 1, 1" tail ";}"                        \
                 : fragments                                                                                       \
                 : "l"(a), "l"(b), "r"(int{keep}));                                                                \
  }

#define GEMMA_CUDA_A_HELD(name, Type, n, types, transposed, a_at, b_at, keep_at, registers, fragments)      \
  __device__ inline void name(Type, float(&d)[n / 8][4], const uint32_t(&a)[4], uint64_t b, bool keep) {    \
    asm volatile("{.reg .pred keep; setp.ne.b32 keep, " keep_at ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32." types " {" registers "}, {" a_at "}, " b_at ", keep, 1, 1, " #transposed ";}"   \
                 : fragments                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));                     \
  }

// Of a few tokens, a tile of keys, or one of weights.
#define GEMMA_CUDA_ALL_COLUMNS(Type, k, types, tail)                                                 \
  GEMMA_CUDA_COLUMNS(Type, 8, k, types, tail, "%4", "%5", "%6", GEMMA_CUDA_D4, GEMMA_CUDA_F1)        \
  GEMMA_CUDA_COLUMNS(Type, 16, k, types, tail, "%8", "%9", "%10", GEMMA_CUDA_D8, GEMMA_CUDA_F2)      \
  GEMMA_CUDA_COLUMNS(Type, 32, k, types, tail, "%16", "%17", "%18", GEMMA_CUDA_D16, GEMMA_CUDA_F4)   \
  GEMMA_CUDA_COLUMNS(Type, 64, k, types, tail, "%32", "%33", "%34", GEMMA_CUDA_D32, GEMMA_CUDA_F8)   \
  GEMMA_CUDA_COLUMNS(Type, 128, k, types, tail, "%64", "%65", "%66", GEMMA_CUDA_D64, GEMMA_CUDA_F16) \
  GEMMA_CUDA_COLUMNS(Type, 256, k, types, tail, "%128", "%129", "%130", GEMMA_CUDA_D128, GEMMA_CUDA_F32)

// Of the values of a head.
#define GEMMA_CUDA_ALL_ROWS(Type, types)                                                                           \
  GEMMA_CUDA_A_HELD(multiply_rows, Type, 128, types, 1, "%64, %65, %66, %67", "%68", "%69", GEMMA_CUDA_D64,        \
                    GEMMA_CUDA_F16)                                                                                \
  GEMMA_CUDA_A_HELD(multiply_rows, Type, 256, types, 1, "%128, %129, %130, %131", "%132", "%133", GEMMA_CUDA_D128, \
                    GEMMA_CUDA_F32)

// Of a few tokens, with weights that were unpacked.
GEMMA_CUDA_A_HELD(multiply_columns, Bf16, 8, "bf16.bf16", 0, "%4, %5, %6, %7", "%8", "%9", GEMMA_CUDA_D4, GEMMA_CUDA_F1)
GEMMA_CUDA_A_HELD(multiply_columns, Bf16, 16, "bf16.bf16", 0, "%8, %9, %10, %11", "%12", "%13", GEMMA_CUDA_D8,
                  GEMMA_CUDA_F2)
GEMMA_CUDA_A_HELD(multiply_columns, Bf16, 32, "bf16.bf16", 0, "%16, %17, %18, %19", "%20", "%21", GEMMA_CUDA_D16,
                  GEMMA_CUDA_F4)
GEMMA_CUDA_A_HELD(multiply_columns, Bf16, 64, "bf16.bf16", 0, "%32, %33, %34, %35", "%36", "%37", GEMMA_CUDA_D32,
                  GEMMA_CUDA_F8)

GEMMA_CUDA_ALL_COLUMNS(Bf16, 16, "bf16.bf16", ", 0, 0")
GEMMA_CUDA_ALL_COLUMNS(F16, 16, "f16.f16", ", 0, 0")
GEMMA_CUDA_ALL_COLUMNS(E4m3, 32, "e4m3.e4m3", "")
GEMMA_CUDA_ALL_ROWS(Bf16, "bf16.bf16")
GEMMA_CUDA_ALL_ROWS(F16, "f16.f16")

#undef GEMMA_CUDA_D4
#undef GEMMA_CUDA_D8
#undef GEMMA_CUDA_D16
#undef GEMMA_CUDA_D32
#undef GEMMA_CUDA_D64
#undef GEMMA_CUDA_D128
#undef GEMMA_CUDA_FRAGMENT
#undef GEMMA_CUDA_F1
#undef GEMMA_CUDA_F2
#undef GEMMA_CUDA_F4
#undef GEMMA_CUDA_F8
#undef GEMMA_CUDA_F16
#undef GEMMA_CUDA_F32
#undef GEMMA_CUDA_COLUMNS
#undef GEMMA_CUDA_A_HELD
#undef GEMMA_CUDA_ALL_COLUMNS
#undef GEMMA_CUDA_ALL_ROWS

}  // namespace gemma_cuda::cuda
